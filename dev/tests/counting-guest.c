/*
 * A guest that does nothing but count numbered packets, so that it takes many
 * of them even if it is emulated in an emulated machine.  QEMU loads it with
 * -kernel.  The packets are those of dev/demo/demo-packets.c.
 *
 * What it counts is in its memory, at RECORD, where the monitor can read it.
 * It knows one virtio-net device, legacy, on the first PCI bus, and never
 * sends.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <stdint.h>

#define RECORD 0x1000000        /* 0 at first */
#define MAGIC 0x6e756d62u
#define NUMBERS (1u << 20)

/* How often packets are looked for in a second. */
#define TICKS 250

#define RING_MAX 1024
#define BUFFER_SIZE 256         /* nothing longer is sent */
#define NET_HEADER 10
#define PAYLOAD (14 + 20 + 8)   /* of UDP, in a frame */

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/*
 * QEMU starts what has a multiboot header in 32-bit mode.  The interrupt, of
 * the timer, only ends a HLT.
 */
asm(".text\n"
    ".align 4\n"
    ".long 0x1badb002, 0, -0x1badb002\n"
    ".globl _start\n"
    "_start: mov $stack_end, %esp\n"
    "    jmp run\n"
    "tick: push %eax\n"
    "    mov $0x20, %al\n"
    "    out %al, $0x20\n"
    "    pop %eax\n"
    "    iret\n"
    ".lcomm stack, 16384\n"
    "stack_end = stack + 16384\n");

void run(void);
void tick(void);

static struct {
    uint16_t low, selector, flags, high;
} gates[48];

/* A legacy virtqueue: descriptors, and behind them the two rings */
static struct {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
} queue[RING_MAX * 2] __attribute__((aligned(4096)));

/* volatile: the device writes there, too */
static volatile struct {
    uint16_t flags, index, ring[];
} *avail;

/* volatile, as above */
static volatile struct {
    uint16_t flags, index;
    struct {
        uint32_t id, length;
    } ring[];
} *used;

static uint8_t buffers[RING_MAX][BUFFER_SIZE];
static uint16_t io, size, taken;

/* What came; the same is in dev/tests/test-switchover */
static struct {
    uint32_t ready;             /* the device has been started */
    uint32_t run, total, highest;
    uint32_t late;              /* than one with a higher number */
    uint32_t depth;             /* how much higher that was at most */
    uint32_t first_late;        /* the lowest number that came late */
    uint32_t padding;
    uint8_t seen[NUMBERS];      /* how often each number came */
} *const record = (void *)RECORD;

static void out8(uint16_t port, uint8_t value)
{
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void out16(uint16_t port, uint16_t value)
{
    asm volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static void out32(uint16_t port, uint32_t value)
{
    asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static uint32_t in32(uint16_t port)
{
    uint32_t value;

    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* The port at which a register of a PCI device can be read or written now */
static uint16_t pci(unsigned device, unsigned reg)
{
    out32(0xcf8, 1u << 31 | device << 11 | reg);
    return 0xcfc;
}

static void barrier(void)
{
    asm volatile("lock; orl $0, (%%esp)" : : : "memory");
}

/* Counting */

static uint32_t big_endian(const uint8_t *at)
{
    return __builtin_bswap32(*(const uint32_t *)at);
}

static void begin_run(uint32_t run)
{
    void *to = record->seen;
    uint32_t words = NUMBERS / 4;

    asm volatile("rep stosl" : "+D"(to), "+c"(words) : "a"(0) : "memory");
    record->run = run;
    record->total = record->highest = record->late = record->depth = 0;
    record->first_late = NUMBERS;
}

static void count(const uint8_t *packet)
{
    uint32_t run = big_endian(packet + 4), number = big_endian(packet + 8);

    if (big_endian(packet) != MAGIC || number >= NUMBERS) {
        return;
    }
    if (run != record->run || !record->total) {
        begin_run(run);
    }
    record->total++;
    if (number >= record->highest) {
        record->highest = number;
    } else if (!record->seen[number]) {
        record->late++;
        record->depth = MAX(record->depth, record->highest - number);
        record->first_late = MIN(record->first_late, number);
    }
    record->seen[number] += record->seen[number] < UINT8_MAX;
}

/* The device */

static void find_device(void)
{
    unsigned device = 0;

    while (in32(pci(device, 0)) != 0x10001af4) {
        device = (device + 1) % 32;
    }
    io = in32(pci(device, 0x10)) & ~3;
    out32(pci(device, 4), 5);                   /* I/O, bus master */
}

static void start_device(void)
{
    out8(io + 18, 0);
    out8(io + 18, 3);                           /* acknowledged, driver */
    out32(io + 4, in32(io) & 1u << 27);         /* VIRTIO_F_ANY_LAYOUT */
    out16(io + 14, 0);                          /* the receive queue */
    size = in32(io + 12);
    avail = (void *)&queue[size];
    used = (void *)(((uintptr_t)&avail->ring[size + 1] + 4095) & ~4095);
    for (unsigned i = 0; i < size; i++) {
        queue[i].address = (uintptr_t)buffers[i];
        queue[i].length = BUFFER_SIZE;
        queue[i].flags = 2;                     /* the device writes */
        avail->ring[i] = i;
    }
    avail->flags = 1;                           /* no interrupts */
    avail->index = size;
    out32(io + 8, (uintptr_t)queue / 4096);
    out8(io + 18, 7);                           /* driver is ready */
    out16(io + 16, 0);
    record->ready = 1;
}

static void receive(void)
{
    uint16_t before = taken;

    while (taken != used->index) {
        uint32_t id = used->ring[taken++ % size].id;

        count(buffers[id] + NET_HEADER + PAYLOAD);
        avail->ring[avail->index % size] = id;
        barrier();
        avail->index++;
    }
    barrier();
    if (taken != before && !(used->flags & 1)) {
        out16(io + 16, 0);
    }
}

/* The timer */

static void start_timer(void)
{
    static const uint8_t controllers[][2] = {
        { 0x20, 0x11 }, { 0xa0, 0x11 }, { 0x21, 0x20 }, { 0xa1, 0x28 },
        { 0x21, 4 }, { 0xa1, 2 }, { 0x21, 1 }, { 0xa1, 1 },
        { 0x21, 0xfe }, { 0xa1, 0xff },         /* the timer alone */
    };
    struct {
        uint16_t limit;
        const void *base;
    } __attribute__((packed)) table = { sizeof(gates) - 1, gates };
    uint16_t selector;

    /* The loader's segments do. */
    asm("mov %%cs, %0" : "=r"(selector));
    for (unsigned i = 32; i < sizeof(gates) / sizeof(gates[0]); i++) {
        gates[i].low = (uintptr_t)tick;
        gates[i].selector = selector;
        gates[i].flags = 0x8e00;
        gates[i].high = (uintptr_t)tick >> 16;
    }
    asm volatile("lidt %0" : : "m"(table), "m"(gates));
    for (unsigned i = 0; i < sizeof(controllers) / 2; i++) {
        out8(controllers[i][0], controllers[i][1]);
    }
    out8(0x43, 0x34);
    out8(0x40, 1193182 / TICKS % 256);
    out8(0x40, 1193182 / TICKS / 256);
    asm volatile("sti");
}

void run(void)
{
    start_timer();
    find_device();
    start_device();
    for (;;) {
        receive();
        asm volatile("hlt" : : : "memory");
    }
}
