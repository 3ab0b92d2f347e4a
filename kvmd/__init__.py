"""kvmd: one Linux KVM host and its guests, kept as a directory of TOML files."""

__version__ = "0.1.0"
