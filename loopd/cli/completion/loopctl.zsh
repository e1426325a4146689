#compdef loopctl
# SPDX-License-Identifier: LGPL-2.1-or-later
# loopctl's completion for zsh.

# Devices that are bound, or files, which may be attached.
_loopctl_targets() {
    local -a devices
    devices=(/sys/block/loop*/loop(N:h:t))
    [[ $PREFIX == l* ]] || devices=(/dev/$^devices)
    _alternative "devices:device:($devices)" 'files:file:_files'
}

_loopctl_columns() {
    _values -s , column NAME AUTOCLEAR BACK-FILE BACK-INO 'BACK-MAJ\:MIN' 'MAJ\:MIN' OFFSET PARTSCAN RO \
        SIZELIMIT DIO LOG-SEC REF SIZE OWNER LIFETIME STATE HOLDER HOLDS LOCK DISKSEQ ATTACHED PARTITIONS
}

_loopctl() {
    local curcontext=$curcontext state
    local -a all attach range settle line
    all=(
        '(-h --help)'{-h,--help}'[show help]'
        '(-J --json)'{-J,--json}'[tell the result as JSON]'
        '--no-ask-password[ask nobody for a password]'
    )
    range=(
        '(-o --offset)'{-o,--offset=}'[where in the file it starts]:size'
        '--sizelimit=[at most so much]:size'
    )
    settle='--no-settle[do not wait for udev]'
    attach=(
        $all $range $settle
        '(-r --read-only)'{-r,--read-only}'[take no writes]'
        '(-b --sector-size)'{-b,--sector-size=}'[of the device]:size'
        '(-P --partscan)'{-P,--partscan}'[make devices for the partitions]'
        '--direct-io=-[bypass the page cache]::switch:(on off)'
        '--loop-ref=[a name for the device]:name'
        '--lock=[keep udev off]:lock:(shared exclusive)'
        '--number=[/dev/loopN and no other]:number'
        '--allow-overlap[even if another has the same bytes]'
        '(-L --nooverlap)'{-L,--nooverlap}'[not if another has the same bytes]'
        '--in-memory[attach a copy]'
    )
    _arguments -C \
        '(-h --help)'{-h,--help}'[show help]' \
        '(-V --version)'{-V,--version}'[print the version]' \
        '1:command:((
            attach\:"attach a file"
            hold\:"attach a file, and stay until stopped"
            detach\:"detach devices"
            resize\:"take up a new size, or set offset and limit"
            rescan\:"bring the partitions in step with the table"
            list\:"list all loop devices, or one"
            show\:"tell all about a device"
            set\:"change a device"
            open\:"run a command that has the device open"
            monitor\:"tell of devices as they come and go"
            run\:"attach a file for as long as a command runs"
        ))' \
        '*:: :->arguments' && return
    [[ $state == arguments ]] || return 1
    curcontext=${curcontext%:*:*}:loopctl-$words[1]:
    case $words[1] in
        attach)
            _arguments -s -S $attach \
                '--lifetime=[how long it stays]:lifetime:(connection user system)' '1:file:_files'
            ;;
        hold)
            _arguments -s -S $attach \
                '--default-loop-ref=[a name, if it is not too long]:name' '1:file:_files'
            ;;
        run) _arguments -s $attach '1:file:_files' '*::command:_normal' ;;
        detach)
            _arguments -s -S $all '--all[all that are yours]' '--lazy[also what is mounted]' \
                '(-j --associated)'{-j,--associated=}'[those that have this file]:file:_files' \
                '*:device:_loopctl_targets'
            ;;
        resize)
            _arguments -s -S $all $range '--force[even while it is in use]' \
                '--allow-overlap[even if another has the same bytes]' \
                '1:device:_loopctl_targets'
            ;;
        list)
            _arguments -s -S $all \
                '(-j --associated)'{-j,--associated=}'[those that have this file]:file:_files' \
                '(-O --output)'{-O,--output=}'[columns]:columns:_loopctl_columns' \
                '--output-all[all columns]' \
                '(-n --noheadings)'{-n,--noheadings}'[no line of headings]' \
                '(-o --offset)'{-o,--offset=}'[those that start there]:size' \
                '--bytes[sizes in bytes]' '--raw[one space between columns]' \
                '1:device:_loopctl_targets'
            ;;
        rescan) _arguments -s -S $all $settle '1:device:_loopctl_targets' ;;
        show) _arguments -s -S $all '1:device:_loopctl_targets' ;;
        set)
            _arguments -s -S $all \
                '--direct-io=-[bypass the page cache]::switch:(on off)' \
                '--loop-ref=[another name]:name' \
                '(-b --sector-size)'{-b,--sector-size=}'[of the device]:size' \
                '--lifetime=[how long it stays]:lifetime:(user system)' \
                '--autoclear=[detach at the last close]:switch:(on off)' \
                '1:device:_loopctl_targets'
            ;;
        open)
            _arguments -s $all $settle '(-w --read-write)'{-w,--read-write}'[for writing, too]' \
                '--partition=[this partition, not the whole]:number' \
                '1:device:_loopctl_targets' '*::command:_normal'
            ;;
        monitor) _arguments -s -S $all ;;
        *) return 1 ;;
    esac
}

_loopctl "$@"
