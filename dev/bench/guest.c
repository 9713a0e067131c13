/*
 * A guest's memory: the half of a driver that gives buffers back
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The guest's RAM is a file.  Its receive ring is a legacy virtio ring at
 * RING, set up by "vhost" with as many descriptors as it has entries; each
 * buffer that vhost has used is made available again, in the same order.
 */

#define _DEFAULT_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "traffic.h"

#define RAM (16 << 20)
#define RING (1 << 20)
#define ENTRIES 1024
#define AVAIL_INDEX (RING + 16 * ENTRIES + 2)
#define USED_INDEX (RING + 0x5000 + 2)
#define PERIOD_NS 200000

int guest_main(const Options *o)
{
    int fd = open(o->target[0], O_RDWR);
    char *ram;

    if (fd < 0) {
        die("open '%s': %s", o->target[0], strerror(errno));
    }
    ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (ram == MAP_FAILED) {
        die("mmap '%s': %s", o->target[0], strerror(errno));
    }
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        uint16_t used = atomic_load_explicit(
            (_Atomic uint16_t *)(ram + USED_INDEX), memory_order_acquire);

        atomic_store_explicit((_Atomic uint16_t *)(ram + AVAIL_INDEX),
                              used + ENTRIES, memory_order_release);
        sleep_until(now_ns() + PERIOD_NS);
    }
}
