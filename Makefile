# SPDX-License-Identifier: GPL-2.0-or-later
#
# Names for what dev/make does; see meson.build.

.PHONY: help demo check check-long bench bench-vhost qemu
.PHONY: series check-series clean
.NOTPARALLEL:

help:
	@echo 'make demo   live migration with and without the redirector'
	@echo 'make check  the tests'
	@echo 'make check-long  more rounds, and more tests'
	@echo 'make bench  what the redirector costs, beside others; as root'
	@echo "make bench ROWS='64 B 40k/s'  only the rows that match"
	@echo 'make bench-vhost  the same for the capture, beside a vhost worker'
	@echo 'make qemu   the patched QEMU, and where it is'
	@echo 'make series   the patches as mails and for Debian, in build/series'
	@echo 'make check-series  compile and test at each of them'
	@echo 'make clean  remove build/; downloads are kept in the cache'
	@echo
	@echo 'QEMU_SRC=<dir>   with the others: work on a copy of this QEMU tree'
	@echo 'VHOST_HOST=1     use the kernel of the host, which needs'
	@echo '                 /dev/vhost-net, and not that of a virtual machine'

demo check check-long bench bench-vhost qemu \
series check-series:
	@dev/make $@

clean:
	rm -rf build
