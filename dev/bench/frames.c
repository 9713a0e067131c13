/*
 * The benchmark's frames: how they are made, and what is counted
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <arpa/inet.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "traffic.h"

#define MAGIC 0x62656e63
#define ETHERTYPE 0x88b5        /* local experimental */
#define IP_OFFSET ETH_HLEN
#define TCP_OFFSET (IP_OFFSET + 20)
#define TCP_HLEN 20
#define GSO_SIZE 1448
#define MAX_LATENCIES (8u << 20)

static void put16(uint8_t *to, unsigned value)
{
    to[0] = value >> 8;
    to[1] = value;
}

static uint32_t sum16(const uint8_t *data, size_t len)
{
    uint32_t sum = 0;

    for (size_t i = 0; i < len; i += 2) {
        sum += data[i] << 8 | data[i + 1];
    }
    return sum;
}

static uint16_t fold(uint32_t sum)
{
    while (sum >> 16) {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    return sum;
}

/* As a network stack hands it to a device that segments and checksums. */
static void head_init_gso(Head *head, unsigned size)
{
    uint8_t *ip = head->frame + IP_OFFSET, *tcp = head->frame + TCP_OFFSET;
    unsigned ip_len = size - IP_OFFSET, tcp_len = size - TCP_OFFSET;

    head->vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    head->vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
    head->vnet.hdr_len = TCP_OFFSET + TCP_HLEN;
    head->vnet.gso_size = GSO_SIZE;
    head->vnet.csum_start = TCP_OFFSET;
    head->vnet.csum_offset = 16;

    put16(head->frame + 12, ETH_P_IP);
    ip[0] = 0x45;
    put16(ip + 2, ip_len);
    ip[8] = 64;
    ip[9] = IPPROTO_TCP;
    memcpy(ip + 12, (uint8_t[]) { 192, 0, 2, 1, 192, 0, 2, 2 }, 8);
    put16(ip + 10, ~fold(sum16(ip, 20)));
    put16(tcp, 1024);
    put16(tcp + 2, 1024);
    tcp[12] = TCP_HLEN / 4 << 4;
    tcp[13] = 0x10;             /* ACK */
    put16(tcp + 14, 0xffff);
    put16(tcp + 16, fold(sum16(ip + 12, 8) + IPPROTO_TCP + tcp_len));
    head->len = TCP_OFFSET + TCP_HLEN;
}

void head_init(Head *head, const Options *o, unsigned i)
{
    Options small = *o;

    if (o->mix && i % 2) {
        small.size = SMALL_FRAME;
        small.gso = false;
        o = &small;
    }
    memset(head, 0, sizeof(*head));
    memcpy(head->frame, (uint8_t[]) { 2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1 },
           2 * ETH_ALEN);
    if (o->gso) {
        head_init_gso(head, o->size);
    } else {
        put16(head->frame + 12, ETHERTYPE);
        head->len = ETH_HLEN;
    }
    head->record.magic = MAGIC;
    head->len += sizeof(Record);
    if ((size_t)o->size < head->len) {
        die("size=%d: a frame needs %zu bytes", o->size, head->len);
    }
    head->body = o->size - head->len;
}

/*
 * Frame I of all goes to the target I % targets, as its I / targets.  Those of
 * one call were sent when the call begins, at @ns.
 */
void head_stamp(Head *head, const Options *o, uint64_t i, uint64_t ns)
{
    head->record.flow = i % o->targets;
    head->record.number = i / o->targets;
    head->record.ns = ns;
    memcpy(head->frame + head->len - sizeof(Record), &head->record,
           sizeof(Record));
}

void tally_init(Tally *tally, const Options *o)
{
    memset(tally, 0, sizeof(*tally));
    tally->options = o;
    tally->latency = allocate(MAX_LATENCIES * sizeof(*tally->latency));
}

void tally_frame(Tally *tally, const uint8_t *frame, size_t len, uint64_t now)
{
    size_t at = ETH_HLEN;
    Record record;

    if (len >= TCP_OFFSET + TCP_HLEN && frame[12] == ETH_P_IP >> 8 &&
        frame[13] == (ETH_P_IP & 0xff)) {
        at = TCP_OFFSET + TCP_HLEN;
    }
    if (len < at + sizeof(record) ||
        (len != (size_t)tally->options->size &&
         !(tally->options->mix && len == SMALL_FRAME))) {
        tally->foreign++;
        return;
    }
    memcpy(&record, frame + at, sizeof(record));
    if (record.magic != MAGIC || record.flow >= tally->options->targets) {
        tally->foreign++;
        return;
    }
    if (record.number < tally->next[record.flow]) {
        tally->disorder++;
        return;
    }
    tally->missing += record.number - tally->next[record.flow];
    tally->next[record.flow] = record.number + 1;
    if (tally->latencies < MAX_LATENCIES) {
        uint64_t ns = now > record.ns ? now - record.ns : 0;

        tally->latency[tally->latencies++] = ns < UINT32_MAX ? ns : UINT32_MAX;
    }
    tally->frames++;
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return x < y ? -1 : x > y;
}

/* The latencies of which half, and 99 %, are below; 0 if there are none. */
void tally_print(Tally *tally)
{
    qsort(tally->latency, tally->latencies, sizeof(*tally->latency), compare);
    printf("{\"frames\": %" PRIu64 ", \"missing\": %" PRIu64
           ", \"disorder\": %" PRIu64 ", \"foreign\": %" PRIu64
           ", \"p50_ns\": %" PRIu32 ", \"p99_ns\": %" PRIu32 "}\n",
           tally->frames, tally->missing, tally->disorder, tally->foreign,
           tally->latency[tally->latencies / 2],
           tally->latency[tally->latencies * 99 / 100]);
    fflush(stdout);
}
