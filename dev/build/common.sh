# SPDX-License-Identifier: GPL-2.0-or-later
#
# Shared by the project's shell tools: where things are, and how to report.
# Sourced, not run.

set -euo pipefail

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
BUILD=${BUILD:-$TOP/build}
# Downloads and unpacked packages; outside the clone, so that they survive it.
CACHE=${VHOST_NETFILTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vhost-netfilter}

say() { printf '%s\n' ">>> $*" >&2; }
die() { printf '%s\n' "error: $1" >&2; shift; printf '  %s\n' "$@" >&2; exit 1; }

# The address of the Debian archive that apt is set up with.
archive_uri() {
    apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' \
            'Created-By: Packages' 2>/dev/null |
        awk '$1 == "Debian" && $2 !~ /security/ {
            sub("/$", "", $2); print $2; exit }'
}
