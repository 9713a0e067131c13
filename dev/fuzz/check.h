/*
 * What the fuzzers share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef FUZZ_CHECK_H
#define FUZZ_CHECK_H

/* Unlike assert() it is never compiled out. */
#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            abort(); \
        } \
    } while (0)

#endif /* FUZZ_CHECK_H */
