/*
 * Netfilters that reach the packets of a TAP with vhost: other hosts than Linux
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Every filter works on the chain, and there are no properties.
 */

#include "qemu/osdep.h"
#include "net/filter-tap.h"

void filter_tap_add_inject_properties(ObjectClass *oc)
{
}

bool filter_tap_setup(FilterTap *ft, const FilterTapConfig *config,
                      Error **errp)
{
    return true;
}

void filter_tap_cleanup(FilterTap *ft)
{
}

void filter_tap_status_changed(NetFilterState *nf, Error **errp)
{
    g_assert_not_reached();     /* endpoints is always NULL */
}

ssize_t filter_tap_receive_iov(FilterTap *ft, unsigned flags,
                               const struct iovec *iov, int iovcnt)
{
    g_assert_not_reached();     /* endpoints is always NULL */
}

static const TypeInfo filter_tap_types[] = {
    {
        .name = TYPE_FILTER_TAP,
        .parent = TYPE_NETFILTER,
        .abstract = true,
        .instance_size = sizeof(FilterTap),
    },
};

DEFINE_TYPES(filter_tap_types)
