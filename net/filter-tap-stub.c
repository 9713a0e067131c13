/*
 * Packets of a TAP with vhost, for netfilters: hosts other than Linux
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "net/filter-tap.h"

void filter_tap_add_properties(ObjectClass *oc, ptrdiff_t offset,
                               bool injects)
{
}

bool filter_tap_reaches(const FilterTap *ft, NetClientState *netdev)
{
    return false;
}

bool filter_tap_setup(FilterTap *ft, NetFilterState *nf, CharFrontend *chr_in,
                      CharFrontend *chr_out, bool vnet_hdr, Error **errp)
{
    return true;
}

bool filter_tap_setup_sink(FilterTap *ft, NetFilterState *nf,
                           FilterTapSink *sink, void *opaque, Error **errp)
{
    return true;
}

void filter_tap_cleanup(FilterTap *ft)
{
}

void filter_tap_status_changed(FilterTap *ft)
{
    g_assert_not_reached();
}

bool filter_tap_pauses(NetClientState *netdev)
{
    return false;
}

ssize_t filter_tap_receive_iov(FilterTap *ft, NetClientState *sender,
                               const struct iovec *iov, int iovcnt)
{
    g_assert_not_reached();
}
