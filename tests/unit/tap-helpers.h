/*
 * TAPs in a network namespace of their own, for tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_TAP_HELPERS_H
#define TESTS_TAP_HELPERS_H

#include "net/packet-socket.h"
#include <net/if.h>
#include <linux/if_ether.h>

#define LIMIT_MS 20000

/* The EtherType for local experiments */
#define ETH_P_TEST 0x88b5

/* The longest IP packet, with an Ethernet header and two tags */
#define FRAME_MAX (65535 + ETH_HLEN + 8)
#define FRAME_ROOM (FRAME_MAX + PACKET_SOCKET_TAG_ROOM)

typedef struct Tap {
    int fd;
    char name[IFNAMSIZ];
    unsigned index;
    int sender;                 /* a packet socket, in place of the host */
} Tap;

typedef struct Frame {
    struct virtio_net_hdr hdr;
    uint8_t data[FRAME_ROOM];
    size_t len;
} Frame;

/*
 * Go to a new network namespace, where no frame comes that the tests did not
 * send.  Called once, before any test.
 */
void enter_namespace(void);

/* Returns: whether that was possible.  If not, the test is skipped. */
bool can_run(void);

void set_up(const char *name, bool up);
void set_queue_len(Tap *tap, int len);
void set_mtu(Tap *tap, int mtu);

/* @name has room for IFNAMSIZ bytes.  Returns: whether there are bridges. */
bool bridge_new(char *name);
void bridge_add(const char *name, const Tap *tap);
void bridge_delete(const char *name);

/* A packet socket that gets nothing */
int sender_new(unsigned index);

void tap_new(Tap *tap);
void tap_delete(Tap *tap);

/* What the guest can take; the host does the rest. */
void tap_set_offload(Tap *tap, unsigned offload);

bool readable(int fd, int timeout);

/* A frame with its header.  Returns: false with errno if it is refused. */
bool frame_write(int fd, const Frame *frame);

/* The guest reads.  Returns: false if there is no frame. */
bool tap_try_read(Tap *tap, Frame *frame);
void tap_read(Tap *tap, Frame *frame);
void tap_drain(Tap *tap);

/* The guest sends. */
void tap_write(Tap *tap, const Frame *frame);

/* The sum of RFC 1071, one byte after the other */
uint32_t sum_bytes(const uint8_t *data, size_t len);

/* The sum of the pseudo header of the IP packet at @ip */
uint32_t sum_pseudo(const uint8_t *ip, uint32_t len, uint8_t protocol);

#endif /* TESTS_TAP_HELPERS_H */
