#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Loop devices from a shell, with busctl alone.
#
#   devices.sh list            node, size, owner and lifetime of each
#   devices.sh attach IMAGE    print the node (busctl of systemd 257 or newer, which can pass fds)
#   devices.sh detach NODE
set -eu

loopd=org.example.Loop1
manager=/org/example/Loop1

# busctl's answers begin with their types, and strings are quoted.
call() {
	busctl --allow-interactive-authorization=yes call "$loopd" "$@"
}
property() {
	answer=$(busctl get-property "$loopd" "$1" $loopd.Device "$2") || return
	echo "$answer" | sed 's/^[^ ]* //; s/^"//; s/"$//'
}

usage() {
	sed -n 's/^#   //p' "$0" >&2
	exit 2
}

case ${1-} in
list)
	[ $# = 1 ] || usage
	objects=$(busctl tree --list "$loopd")
	for device in $objects; do
		case $device in $manager/device/*) ;; *) continue ;; esac
		# It may have gone since.
		node=$(property "$device" Node 2>/dev/null) || continue
		size=$(property "$device" Size 2>/dev/null) || continue
		owner=$(property "$device" Owner 2>/dev/null) || continue
		lifetime=$(property "$device" Lifetime 2>/dev/null) || continue
		echo "$node $size $owner $lifetime"
	done
	;;
attach)
	[ $# = 2 ] || usage
	version=$(busctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
	[ "$version" -ge 257 ] || {
		echo "devices.sh: busctl $version cannot pass a file, use 'loopctl attach'" >&2
		exit 1
	}
	# busctl leaves the bus with its answer, and so would the device: it has to stay for longer.
	lifetime=user
	[ "$(id -u)" != 0 ] || lifetime=system
	answer=$(call $manager $loopd Attach 'ha{sv}' 5 1 lifetime s $lifetime 5<>"$2")
	echo "$answer" | sed 's/^ost "[^"]*" "\([^"]*\)" .*/\1/'
	;;
detach)
	[ $# = 2 ] || usage
	answer=$(call $manager $loopd GetDeviceByNode s "$2")
	device=$(echo "$answer" | sed 's/^o "\(.*\)"$/\1/')
	gone=$(call "$device" $loopd.Device Detach 'a{sv}' 0)
	[ "$gone" = 'b true' ] || echo "$2 is in use, and goes when it is not any more"
	;;
*)
	usage
	;;
esac
