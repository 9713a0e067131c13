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
 * All functions are called with the BQL held; none of them blocks.  The caller
 * handles the character device's events: when the connection closes it calls
 * frame_writer_rewind() or frame_reader_reset().  The character device
 * outlives the writer or reader.
 */

#ifndef QEMU_NET_FRAME_STREAM_H
#define QEMU_NET_FRAME_STREAM_H

#include "chardev/char-fe.h"
#include "net/net.h"
#include "qemu/units.h"

/* The longest payload in bytes; every reader of the stream accepts as much. */
#define FRAME_STREAM_MAX_PAYLOAD NET_BUFSIZE

/* How many bytes a reader is to hold at most. */
#define FRAME_READER_LIMIT (1 * MiB)

/* How many frames are handed out at a time. */
#define FRAME_READER_BATCH 64

/* Returns whether @chr can carry a stream. */
bool frame_stream_check(CharFrontend *chr, Error **errp);

/* Writer */

typedef struct FrameWriter FrameWriter;

/* The writer may have room again, or the peer has gone. */
typedef void FrameWriterProgress(void *opaque);

/*
 * Create a writer to @chr, which frame_writer_close() destroys.
 *
 * @vnet_hdr: whether the stream tells the length of the virtio-net header
 * @limit: how many bytes it holds when it is full; it allocates up to 5/4 of it
 * @progress: called from the main loop when a peer that had not kept up can
 *            accept more, or has gone
 */
FrameWriter *frame_writer_new(CharFrontend *chr, bool vnet_hdr, size_t limit,
                              FrameWriterProgress *progress, void *opaque);

/*
 * Returns where to put the payload of the next frame, up to @size bytes.  It
 * stays valid until the next call of any of these functions.
 */
uint8_t *frame_writer_reserve(FrameWriter *fw, size_t size);

/*
 * Stage the frame whose payload of @size bytes was put where
 * frame_writer_reserve() says.  @size must not be more than reserved.
 */
void frame_writer_commit(FrameWriter *fw, uint32_t vnet_hdr_len, size_t size);

/*
 * Returns whether the caller is to stop reading its source.  It can still stage
 * frames that it cannot refuse.
 */
bool frame_writer_full(const FrameWriter *fw);

/* Returns whether nothing is staged. */
bool frame_writer_empty(const FrameWriter *fw);

/*
 * Write what the peer accepts now; the rest follows as it accepts more.  While
 * the character device is watched for room, a call does nothing unless @now is
 * set.  Returns 0, also if there was no room, or a negative errno if writing
 * failed.  What is staged stays until it is written or discarded.
 */
int frame_writer_flush(FrameWriter *fw, bool now);

/*
 * Discard the frames of which nothing has been written yet.  Returns their
 * number.
 */
uint64_t frame_writer_discard(FrameWriter *fw);

/*
 * The connection is gone: the frame that was cut off counts as not begun.
 * After the next connection frame_writer_flush() begins with it.
 */
void frame_writer_rewind(FrameWriter *fw);

/*
 * Discard what is staged, and free @fw.  If the peer has got a part of a frame,
 * close the connection, as its next user begins with a new one.  The caller has
 * removed its handlers of the character device.  Returns the number of frames
 * that the peer has not got, or not as a whole.
 */
uint64_t frame_writer_close(FrameWriter *fw);

/* Reader */

typedef struct FrameReader FrameReader;

typedef struct StreamFrame {
    uint8_t *payload;           /* the handler may write to it */
    size_t size;                /* of it in bytes; may be 0 */
    uint32_t vnet_hdr_len;      /* as the stream tells, or 0 if it does not */
} StreamFrame;

/*
 * Handles the next @n frames of the stream, 1 to FRAME_READER_BATCH.  Returns
 * how many of them it has handled.  If not all, it is called again, with the
 * rest, after frame_reader_resume(), and not before.
 */
typedef size_t FrameReaderHandler(void *opaque, const StreamFrame *frames,
                                  size_t n);

/*
 * Create a reader, which frame_reader_close() destroys.
 *
 * @chr: where the frames come from, for messages and to close the connection
 * @vnet_hdr: whether the stream tells the length of the virtio-net header
 * @errors: counts the connections that were closed because of a bad length
 */
FrameReader *frame_reader_new(CharFrontend *chr, bool vnet_hdr,
                              uint64_t *errors, FrameReaderHandler *handler,
                              void *opaque);

/* Returns how many more bytes the reader is to get now. */
size_t frame_reader_room(const FrameReader *fr);

/*
 * Accept @size bytes of the stream, and hand out the frames that are complete;
 * if they are many, a part of them later from the main loop.  A length of more
 * than FRAME_STREAM_MAX_PAYLOAD closes the connection, the first time with an
 * error message, and what follows is ignored until frame_reader_reset().
 */
void frame_reader_push(FrameReader *fr, const uint8_t *data, size_t size);

/* Go on after the handler has not handled all frames. */
void frame_reader_resume(FrameReader *fr);

/* Returns whether all that was pushed is handed out. */
bool frame_reader_empty(const FrameReader *fr);

/*
 * The connection is gone: forget the frame that was cut off.  Complete ones are
 * kept.  The next bytes pushed are the start of a frame.
 */
void frame_reader_reset(FrameReader *fr);

/*
 * Free @fr, with what it holds.  As with frame_writer_close(), the caller has
 * removed its handlers, and a connection that is within a frame is closed.
 */
void frame_reader_close(FrameReader *fr);

#endif /* QEMU_NET_FRAME_STREAM_H */
