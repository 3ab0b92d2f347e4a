/*
 * memactor: makes a test guest need memory, and stop needing it.
 *
 *   memactor hold MIB [same|hot|rate=MIB_PER_S ...]   allocate and touch MIB; returns once it is held
 *   memactor free                                     end every holder and wait until it is gone
 *   memactor report                                   one line of /proc/meminfo figures and what is held
 *
 * Pages differ from each other and between guests unless "same" is said (then KSM can merge them). "hot" keeps
 * touching the pages, once a second. The holder is a background process, so the caller's shell stays free.
 * Exit: 0 held/freed, 1 the memory was not to be had (the holder was killed or refused).
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define DIRECTORY "/run/memactor"
#define PAGE 4096
#define MIB (1024UL * 1024UL)

static uint64_t seed(void)
{
    uint64_t value = 0;
    int fd = open("/dev/urandom", O_RDONLY);
    if (fd < 0 || read(fd, &value, sizeof value) != sizeof value)
        value = (uint64_t)time(NULL) << 20 ^ (uint64_t)getpid();
    if (fd >= 0)
        close(fd);
    return value | 1;
}

static void fill(unsigned char *page, int same, uint64_t *state)
{
    if (same) {
        memset(page, 0x5a, PAGE);
        return;
    }
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    for (size_t at = 0; at < PAGE; at += 64)
        memcpy(page + at, state, sizeof *state);
}

static int hold(unsigned long mib, int same, int hot, unsigned long rate)
{
    int ready[2];
    if (pipe(ready) < 0)
        return 1;
    pid_t child = fork();
    if (child < 0)
        return 1;
    if (child > 0) {
        char answer = 0;
        close(ready[1]);
        return read(ready[0], &answer, 1) == 1 && answer == 'h' ? 0 : 1;
    }
    setsid();
    close(ready[0]);
    mkdir(DIRECTORY, 0755);
    char name[64];
    snprintf(name, sizeof name, DIRECTORY "/%d", (int)getpid());
    FILE *note = fopen(name, "w");
    if (note) {
        fprintf(note, "%lu\n", mib);
        fclose(note);
    }
    unsigned char *block = mmap(NULL, mib * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) {
        unlink(name);
        _exit(1);
    }
    uint64_t state = seed();
    for (unsigned long done = 0; done < mib; done++) {
        for (size_t at = 0; at < MIB; at += PAGE)
            fill(block + done * MIB + at, same, &state);
        if (rate && (done + 1) % rate == 0)
            sleep(1);
    }
    if (write(ready[1], "h", 1) != 1)
        _exit(1);
    close(ready[1]);
    int null = open("/dev/null", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(null, fd);
    volatile unsigned char sink = 0;
    for (;;) {
        sleep(1);
        if (hot)
            for (size_t at = 0; at < mib * MIB; at += PAGE)
                sink ^= block[at];
    }
}

static unsigned long each_holder(int kill_it)
{
    unsigned long total = 0;
    DIR *notes = opendir(DIRECTORY);
    if (!notes)
        return 0;
    for (struct dirent *entry; (entry = readdir(notes));) {
        pid_t pid = (pid_t)atol(entry->d_name);
        char name[64];
        unsigned long mib = 0;
        if (pid <= 1)
            continue;
        snprintf(name, sizeof name, DIRECTORY "/%d", (int)pid);
        FILE *note = fopen(name, "r");
        if (!note)
            continue;
        if (fscanf(note, "%lu", &mib) != 1)
            mib = 0;
        fclose(note);
        int gone = kill(pid, kill_it ? SIGKILL : 0) < 0 && errno == ESRCH;
        if (!gone)
            total += mib;
        while (kill_it && kill(pid, 0) == 0)
            usleep(5000);
        if (gone || kill_it)
            unlink(name);
    }
    closedir(notes);
    return total;
}

static int report(void)
{
    char line[128];
    unsigned long value, total = 0, available = 0, swap = 0;
    FILE *meminfo = fopen("/proc/meminfo", "r");
    if (!meminfo)
        return 1;
    while (fgets(line, sizeof line, meminfo)) {
        if (sscanf(line, "MemTotal: %lu", &value) == 1)
            total = value;
        else if (sscanf(line, "MemAvailable: %lu", &value) == 1)
            available = value;
        else if (sscanf(line, "SwapFree: %lu", &value) == 1)
            swap = value;
    }
    fclose(meminfo);
    printf("memactor held_mib=%lu total_kib=%lu available_kib=%lu swap_free_kib=%lu\n", each_holder(0), total,
           available, swap);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc >= 3 && strcmp(argv[1], "hold") == 0) {
        unsigned long mib = strtoul(argv[2], NULL, 10), rate = 0;
        int same = 0, hot = 0;
        for (int at = 3; at < argc; at++) {
            if (strcmp(argv[at], "same") == 0)
                same = 1;
            else if (strcmp(argv[at], "hot") == 0)
                hot = 1;
            else if (strncmp(argv[at], "rate=", 5) == 0)
                rate = strtoul(argv[at] + 5, NULL, 10);
        }
        int failed = mib == 0 || hold(mib, same, hot, rate);
        puts(failed ? "memactor: not held" : "memactor: held");
        return failed;
    }
    if (argc == 2 && strcmp(argv[1], "free") == 0) {
        printf("memactor: freed %lu MiB\n", each_holder(1));
        return 0;
    }
    if (argc == 2 && strcmp(argv[1], "report") == 0)
        return report();
    fputs("usage: memactor hold MIB [same] [hot] [rate=MIB_PER_S] | free | report\n", stderr);
    return 2;
}
