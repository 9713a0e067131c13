/*
 * What the tests of filter-redirector on a TAP with vhost share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Real TAPs and the real vhost worker: it needs root and /dev/vhost-net, and
 * skips all tests without.  libqos sets the guest's device up; our driver works
 * in the guest's memory.  The host's side is a packet socket on the TAP.
 *
 * Frames carry a number.  To see that a frame does not come, a test never
 * waits for a while: it sends another one behind it that must come, and looks
 * at which one is first.
 *
 * Whatever is waited for must come within TIMEOUT_US; what is expected and
 * does not come as it should fails the test.
 */

#ifndef TESTS_FILTER_REDIRECTOR_RIG_H
#define TESTS_FILTER_REDIRECTOR_RIG_H

#include <net/if.h>
#include "libqtest.h"
#include "libqos/virtio-pci.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_net.h"

#define TEST_ETHERTYPE 0x88b5   /* local experimental */
#define FRAME_LEN 64
#define RECORD_LEN (8 + 12 + FRAME_LEN) /* of the stream */
#define BUFFER_LEN 2048         /* of the guest */
#define RING_LEN 256
#define TIMEOUT_US (20 * G_USEC_PER_SEC)

/* Try until it is so.  The CPU may be needed for what makes it so. */
#define WAIT_UNTIL(condition) do {                              \
        gint64 end_ = g_get_monotonic_time() + TIMEOUT_US;      \
        while (!(condition)) {                                  \
            g_assert_cmpint(g_get_monotonic_time(), <, end_);   \
            g_usleep(200);                                      \
        }                                                       \
    } while (0)

/* VIRTIO_NET_F_MQ guests put their queue pairs at 2i (rx) and 2i+1 (tx). */
typedef struct Guest {
    QVirtQueue *rx;
    QVirtQueue *tx;
    uint64_t buffer[RING_LEN];
    uint32_t high_features;     /* from bit 64 on, for the driver's start */
    uint8_t *ram;               /* its memory, which we share */
    uint32_t tx_head;
} Guest;

typedef struct Fixture {
    QTestState *qts;
    QGuestAllocator alloc;
    QPCIBus *bus;
    QVirtioPCIDevice *dev;
    Guest guest;
    char *dir;
    char ifname[IFNAMSIZ];
    int host;                   /* the host's packet socket on the TAP */
    int out;                    /* peer of outdev */
    int in;                     /* peer of indev */
} Fixture;

/* For the command line or object_add(); the direction comes behind. */
#define CAPTURE "-object filter-redirector,id=cap,netdev=n0,outdev=out," \
                "vnet_hdr_support=on,queue="
#define INJECT "-object filter-redirector,id=inj,netdev=n0,indev=in," \
               "vnet_hdr_support=on,queue="
#define STOPPED_ONLY "tx,enable_when_running=off,enable_when_stopped=on"

/* The program: instead of g_test_init() and qtest_add_func() */

/* Tests are named /@name/... and run in namespaces of their own. */
void rig_init(int *argc, char ***argv, const char *name);
void rig_add(const char *path, void (*func)(void));

/* @data is freed after the test. */
void rig_add_data(const char *path, void *data,
                  void (*func)(const void *data));

/* With QEMU running, started with @args, and without or with a driver */
void rig_add_vm(const char *path, const char *args, void (*func)(Fixture *f));
void rig_add_guest(const char *path, const char *args,
                   void (*func)(Fixture *f));

/*
 * What not every QEMU with the redirector has.  The help of @option, "-object
 * TYPE" or "-device TYPE", tells whether there is @property.
 */
bool rig_has(const char *option, const char *property);
#define HAS_DUMP rig_has("-object filter-dump", "packet-socket")
#define HAS_FALLBACK rig_has("-device virtio-net-pci", "datapath")

/* The whole */

/*
 * Start QEMU with a netdev "n0", a NIC "nic", and chardevs "out" and "in",
 * whose peers are connected.  @args come last.  Several may run.  We map the
 * guest's memory, unless @args have a memory-backend of their own.  QEMU's
 * log of dirty pages does not see what our driver writes: it must not write
 * from the start of a migration to its end.
 */
void fixture_init(Fixture *f, const char *netdev_opts, const char *nic_opts,
                  const char *args);
/* The same, with vhost. */
void fixture_start(Fixture *f, const char *args);
/*
 * The same in two steps, for a TAP that somebody else opens: choose its name
 * and the directory of the chardevs' sockets, then start with the options of
 * the netdev.
 */
void fixture_name(Fixture *f);
void fixture_init_named(Fixture *f, const char *netdev, const char *nic_opts,
                        const char *args);
/* ... and remove the directory with all that is in it. */
void fixture_close(Fixture *f);

/* The host's side */

/* It must succeed. */
void run_command(const char *format, ...) G_GNUC_PRINTF(1, 2);
void set_interface_up(const char *ifname, bool up);
int open_host(const char *ifname);
int open_host_protocol(const char *ifname, uint16_t protocol);
int open_tap(const char *ifname);
/* One of the interface's counters in /sys */
uint64_t statistic(const char *ifname, const char *name);

/* FRAME_LEN bytes */
void make_frame(uint8_t *frame, uint32_t number);
uint32_t frame_number(const uint8_t *frame);

void wait_readable(int fd);
void host_send(Fixture *f, uint32_t first, uint32_t count);
/* To a QEMU that cannot pass them on: it takes one, the TAP keeps the rest. */
void host_send_taken(Fixture *f, uint32_t first, uint32_t count);
/* Frames that came in from the guest; what we sent ourselves does not count. */
void expect_host(Fixture *f, uint32_t first, uint32_t count);

/* The number of packet sockets on the interface, by protocol and hook. */
int packet_sockets(const char *ifname, unsigned protocol, int hooked);
/* Those that get frames */
int hooked_sockets(Fixture *f);

/* The ones' complement sum of @data and @start */
uint16_t sum_words(const uint8_t *data, size_t len, uint32_t start);

/* Of seconds, rounds and so on: few, or with -m slow many */
int amount(int quick, int slow);

/* The chardevs' peers */

int connect_to(Fixture *f, const char *name);
/* Returns the peer of a new chardev, a server's socket. */
int add_peer(Fixture *f, const char *id);
void read_full(int fd, void *buf, size_t size);
/* Read one frame of the stream, which has vnet_hdr_support=on. */
size_t read_stream(int fd, uint8_t *frame, size_t size,
                   uint8_t *header, uint32_t *header_len);
/* RECORD_LEN bytes: a frame of make_frame() with its header in the stream */
void make_record(uint8_t *record, uint32_t number);
void expect_stream(int fd, uint32_t first, uint32_t count);
void expect_out(Fixture *f, uint32_t first, uint32_t count);
void in_send(Fixture *f, uint32_t first, uint32_t count);

/* The files of filter-dump and tcpdump, which may be being written */

/* What is before each packet, in the host's byte order */
typedef struct PcapPacket {
    uint32_t sec;
    uint32_t usec;
    uint32_t caplen;            /* bytes in the file */
    uint32_t len;               /* of the packet */
} PcapPacket;

FILE *open_pcap(const char *path);
/* The next packet; it must come. */
void read_pcap(FILE *file, PcapPacket *packet, uint8_t *frame, size_t size);

/* The guest's driver */

/* What is usual, from bit 0 on */
#define GUEST_FEATURES (1ull << VIRTIO_F_VERSION_1 | \
                        1ull << VIRTIO_NET_F_MRG_RXBUF)

/* Start the driver with those of @features that there are ... */
void guest_start_queues(Fixture *f, uint64_t features);
/* ... or with what is usual, up to DRIVER_OK. */
void guest_start(Fixture *f);
/* ... and have the driver set the NIC's MAC address. */
void guest_start_address(Fixture *f, const uint8_t *address);
/* Turn on both queue pairs; the control queue is the fifth. */
void guest_start_multiqueue(Fixture *f, QVirtQueue *queues[5]);
void guest_stop(Fixture *f);

/*
 * Reset one queue, which QEMU does for a driver without VIRTIO_F_RING_RESET
 * too, and leave it at that, or set it up elsewhere.  That is what is
 * returned; @vq is freed.
 */
void guest_disable_queue(Fixture *f, QVirtQueue *vq);
QVirtQueue *guest_move_queue(Fixture *f, QVirtQueue *vq);

/* Give the device @count buffers of BUFFER_LEN. */
void guest_post(Fixture *f, int count);
void expect_guest(Fixture *f, uint32_t first, uint32_t count);
void guest_send(Fixture *f, uint32_t first, uint32_t count);
/* One that the device has to take later; the memory is not freed. */
void guest_send_begin(Fixture *f, uint32_t number);

/* The same for one frame of any kind, with a header that says nothing */
size_t guest_read_frame(Fixture *f, uint8_t *frame, size_t size);
void guest_send_frame(Fixture *f, const uint8_t *frame, size_t size);
/* ... and with a header of 12 bytes before it */
void guest_send_packet(Fixture *f, const uint8_t *packet, size_t size);

/*
 * Post all receive buffers, once, after the guest has started.  guest_take()
 * posts each again.
 */
void guest_post_all(Fixture *f);
/* What a driver of one's own needs, in the mapped memory */
uint16_t guest_used_idx(Guest *guest, QVirtQueue *vq);
void guest_make_available(Guest *guest, QVirtQueue *vq, uint16_t head);
void guest_notify(Fixture *f, QVirtQueue *vq);
/* Have the device send what the descriptor @head of the queue has. */
void guest_send_head(Fixture *f, uint16_t head);
/* Take what there is; call @func for each frame with its number. */
unsigned guest_take(Fixture *f, void (*func)(void *opaque, uint32_t number),
                    void *opaque);
void guest_put(Fixture *f, uint32_t number);

/* QEMU */

bool vhost_started(Fixture *f);
/* Which way the NIC's packets go, and why not through vhost if so */
void expect_datapath(Fixture *f, const char *datapath, const char *reason);
/* vhost comes back, though it may have to wait for packets on their way. */
void wait_vhost(Fixture *f);
uint64_t counter(Fixture *f, const char *id, const char *name);
bool capture_pending(Fixture *f, const char *id);
void wait_inject_pending(Fixture *f, const char *id, bool pending);
void wait_counter(Fixture *f, const char *id, const char *name,
                  uint64_t value);
void expect_source(Fixture *f, const char *id, const char *source);
void set_status(Fixture *f, const char *id, const char *status);
/* A command of the human monitor, which must have nothing to say */
void hmp(Fixture *f, const char *format, ...) G_GNUC_PRINTF(2, 3);
/* As on the command line: "-object type,id=..." */
void object_add(Fixture *f, const char *format, ...) G_GNUC_PRINTF(2, 3);
void add_capture(Fixture *f);   /* CAPTURE "tx" */
void add_inject(Fixture *f);    /* INJECT "tx" */
void del_object(Fixture *f, const char *id);
void vm_stop(Fixture *f);
void vm_cont(Fixture *f);
/* Reset the machine.  The driver has to be started again. */
void vm_reset(Fixture *f);
void expect_status(Fixture *f, const char *command, const char *status);
void expect_connected(Fixture *f, const char *label, bool connected);
int count_fds(Fixture *f);

/* Start a migration, up to where the VM has stopped. */
void migration_start(Fixture *f, const char *uri);
void migration_cancel(Fixture *f);

#endif /* TESTS_FILTER_REDIRECTOR_RIG_H */
