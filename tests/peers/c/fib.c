// fib N REPEAT: computes fib(N) and its decimal text with GMP, REPEAT times, and prints the median of the
// times in milliseconds.
#include <gmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double milliseconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

static int by_size(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

int main(int argc, char **argv)
{
    unsigned long n = argc == 3 ? strtoul(argv[1], NULL, 10) : 0;
    size_t repeat = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
    double *took = calloc(repeat, sizeof *took);
    if (repeat == 0 || !took) {
        fputs("usage: fib N REPEAT\n", stderr);
        return 2;
    }
    for (size_t i = 0; i < repeat; i++) {
        double began = milliseconds();
        mpz_t fib;
        mpz_init(fib);
        mpz_fib_ui(fib, n);
        char *text = mpz_get_str(NULL, 10, fib);
        took[i] = milliseconds() - began;
        free(text);
        mpz_clear(fib);
    }
    qsort(took, repeat, sizeof *took, by_size);
    printf("%.6f\n", took[repeat / 2]);
    free(took);
}
