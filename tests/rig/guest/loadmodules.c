/* loadmodules FILE...: load kernel modules in the order given; one process instead of an insmod for each (TCG). */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    int failed = 0;
    for (int at = 1; at < argc; at++) {
        int fd = open(argv[at], O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)) {
            fprintf(stderr, "loadmodules: %s: %s\n", argv[at], strerror(errno));
            failed = 1;
        }
        if (fd >= 0)
            close(fd);
    }
    return failed;
}
