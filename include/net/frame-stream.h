/*
 * Frames over a character device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The stream that filter-mirror, filter-redirector and colo-compare speak;
 * each frame is
 *
 *   u32 BE  length of the payload
 *   u32 BE  length of its virtio-net header (only with vnet_hdr_support)
 *   bytes   the payload: virtio-net header, if any, and Ethernet frame
 *
 * All functions are called with the BQL held; none of them blocks.  A
 * character device's events are the caller's to handle: it calls the reset
 * functions when the connection closes.
 */

#ifndef QEMU_NET_FRAME_STREAM_H
#define QEMU_NET_FRAME_STREAM_H

#include "chardev/char-fe.h"
#include "net/net.h"
#include "qemu/units.h"

/* The longest payload in bytes; every reader of the stream takes as much. */
#define FRAME_STREAM_MAX_PAYLOAD NET_BUFSIZE

/*
 * What a writer holds in bytes before it is full, unless
 * frame_writer_set_limit() says otherwise (it needs a quarter more memory), and
 * what a reader holds.
 */
#define FRAME_WRITER_LIMIT (1 * MiB)
#define FRAME_READER_LIMIT (1 * MiB)

/* How many frames are handed out at a time. */
#define FRAME_READER_BATCH 64

typedef struct FrameWriter FrameWriter;
typedef struct FrameReader FrameReader;

/* The peer may have taken more, so that the writer is not full any more. */
typedef void FrameWriterProgress(void *opaque);

/**
 * frame_writer_new:
 * @chr: where to write; it outlives the writer
 * @vnet_hdr: whether the stream tells the length of the virtio-net header
 * @progress: called from the main loop when a peer that had not kept up can
 *            take more, or has gone
 * @opaque: for @progress
 *
 * Returns: a writer, which frame_writer_free() destroys.
 */
FrameWriter *frame_writer_new(CharFrontend *chr, bool vnet_hdr,
                              FrameWriterProgress *progress, void *opaque);

/**
 * frame_writer_free:
 * @fw: the writer, or NULL
 *
 * Destroy @fw, with what it still holds.
 */
void frame_writer_free(FrameWriter *fw);

/**
 * frame_writer_set_limit:
 * @fw: the writer
 * @limit: bytes that it holds before it is full
 *
 * Set it before the first frame is staged.
 */
void frame_writer_set_limit(FrameWriter *fw, size_t limit);

/**
 * frame_writer_max_payload:
 * @fw: the writer
 *
 * Returns: the length in bytes of the longest payload that it takes; less than
 * FRAME_STREAM_MAX_PAYLOAD if the character device sends each frame as one
 * datagram.
 */
size_t frame_writer_max_payload(const FrameWriter *fw);

/**
 * frame_writer_reserve:
 * @fw: the writer
 * @size: an upper bound of the payload's length in bytes
 *
 * Returns: where to put the payload of the next frame.  It stays valid until
 * the next call of any of these functions.
 */
uint8_t *frame_writer_reserve(FrameWriter *fw, size_t size);

/**
 * frame_writer_commit:
 * @fw: the writer
 * @vnet_hdr_len: the length in bytes of the payload's virtio-net header
 * @size: the length in bytes of the payload at frame_writer_reserve()'s, no
 *        more than frame_writer_max_payload()
 *
 * Stage the frame.  It is written by frame_writer_flush().
 */
void frame_writer_commit(FrameWriter *fw, uint32_t vnet_hdr_len, size_t size);

/**
 * frame_writer_full:
 * @fw: the writer
 *
 * Returns: whether so much is staged that the caller is to stop taking frames
 * from its source.  The writer still takes those that it cannot refuse.
 */
bool frame_writer_full(const FrameWriter *fw);

/**
 * frame_writer_empty:
 * @fw: the writer
 *
 * Returns: whether all that was staged is written or thrown away.
 */
bool frame_writer_empty(const FrameWriter *fw);

/**
 * frame_writer_flush:
 * @fw: the writer
 *
 * Write what the peer takes now; the rest follows as it takes more.
 *
 * Returns: 0, or a negative errno if the character device cannot write and
 * will not tell when it can.  What is staged stays until it is written,
 * discarded, or thrown away with the writer.
 */
int frame_writer_flush(FrameWriter *fw);

/**
 * frame_writer_offer:
 * @fw: the writer
 *
 * As frame_writer_flush(), and at once, whether or not the character device has
 * told that there is room.  For a caller that has to decide now what becomes of
 * the rest.
 */
int frame_writer_offer(FrameWriter *fw);

/**
 * frame_writer_flush_wait:
 * @fw: the writer
 * @limit: bytes
 *
 * Write, and wait for the peer until no more than @limit is staged.  Meanwhile
 * the main AioContext's handlers run; what they stage is behind, and called by
 * one of them this returns at once.  Not to be called from a coroutine.
 *
 * Returns: as frame_writer_flush().
 */
int frame_writer_flush_wait(FrameWriter *fw, size_t limit);

/**
 * frame_writer_discard:
 * @fw: the writer
 *
 * Throw away the frames of which nothing has been written yet.
 *
 * Returns: their number.
 */
uint64_t frame_writer_discard(FrameWriter *fw);

/**
 * frame_writer_rewind:
 * @fw: the writer
 *
 * The connection is gone: the frame that was cut off counts as not begun.
 * After the next connection frame_writer_flush() begins with it.
 */
void frame_writer_rewind(FrameWriter *fw);

/**
 * frame_writer_close:
 * @fw: the writer, which is freed
 *
 * Throw away what is staged.  Whoever uses the connection next has to begin
 * with a frame, so end it if the peer has got only a part of one.  The caller
 * has removed its handlers of the character device.
 *
 * Returns: the number of frames that the peer has not got, the one that was
 * cut off included.
 */
uint64_t frame_writer_close(FrameWriter *fw);

/**
 * StreamFrame:
 * @payload: the payload; the handler may write to it
 * @size: its length in bytes, 0 included
 * @vnet_hdr_len: the length in bytes of its virtio-net header as the stream
 *                tells, or 0 if it does not
 */
typedef struct StreamFrame {
    uint8_t *payload;
    size_t size;
    uint32_t vnet_hdr_len;
} StreamFrame;

/**
 * FrameReaderHandler:
 * @opaque: as given to frame_reader_new()
 * @frames: the next frames of the stream, in order
 * @n: their number, 1 to FRAME_READER_BATCH
 *
 * Deals with frames of the stream.
 *
 * Returns: how many of them it has dealt with.  If not all, the rest is
 * offered again at frame_reader_resume(), and nothing before.
 */
typedef size_t FrameReaderHandler(void *opaque, const StreamFrame *frames,
                                  size_t n);

/**
 * frame_reader_new:
 * @chr: where the frames come from, for messages and to end the connection;
 *       it outlives the reader
 * @vnet_hdr: whether the stream tells the length of the virtio-net header
 * @handler: called with the frames
 * @opaque: for @handler
 *
 * Returns: a reader, which frame_reader_free() destroys.
 */
FrameReader *frame_reader_new(CharFrontend *chr, bool vnet_hdr,
                              FrameReaderHandler *handler, void *opaque);

/**
 * frame_reader_free:
 * @fr: the reader, or NULL
 *
 * Destroy @fr, with what it still holds.
 */
void frame_reader_free(FrameReader *fr);

/**
 * frame_reader_room:
 * @fr: the reader
 *
 * Returns: how many bytes frame_reader_push() takes now.
 */
size_t frame_reader_room(const FrameReader *fr);

/**
 * frame_reader_push:
 * @fr: the reader
 * @buf: bytes of the stream
 * @size: their number, no more than frame_reader_room()
 *
 * Take @buf, and hand out the frames that are complete; if they are many, a
 * part of them later from the main loop.  A frame that claims to be longer
 * than FRAME_STREAM_MAX_PAYLOAD ends the connection with an error message,
 * and what follows is ignored until frame_reader_reset().
 */
void frame_reader_push(FrameReader *fr, const uint8_t *buf, size_t size);

/**
 * frame_reader_resume:
 * @fr: the reader
 *
 * Go on handing out frames after the handler has not dealt with all.
 */
void frame_reader_resume(FrameReader *fr);

/**
 * frame_reader_mid_frame:
 * @fr: the reader
 *
 * Returns: whether a part of a frame has come and not all of it.
 */
bool frame_reader_mid_frame(const FrameReader *fr);

/**
 * frame_reader_reset:
 * @fr: the reader
 *
 * The connection is gone: forget the frame that was cut off.  Complete ones
 * are kept.  The next bytes pushed are the start of a frame.
 */
void frame_reader_reset(FrameReader *fr);

#endif /* QEMU_NET_FRAME_STREAM_H */
