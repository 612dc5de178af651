/* Runs a program COUNT times, PARALLEL at once, by posix_spawn and wait, and prints the runs per second: no server of
   programs can be faster. Usage: c-spawn COUNT PARALLEL PROGRAM */
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>

extern char **environ;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: c-spawn COUNT PARALLEL PROGRAM\n");
        return 2;
    }
    int count = atoi(argv[1]), parallel = atoi(argv[2]), running = 0;
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
    double begun = seconds();
    for (int started = 0, ended = 0; ended < count;) {
        if (started < count && running < parallel) {
            pid_t pid;
            if (posix_spawnp(&pid, argv[3], &actions, NULL, argv + 3, environ) != 0) {
                fprintf(stderr, "c-spawn: cannot run %s\n", argv[3]);
                return 1;
            }
            started++, running++;
        } else {
            wait(NULL);
            ended++, running--;
        }
    }
    printf("%.0f\n", count / (seconds() - begun));
    return 0;
}
