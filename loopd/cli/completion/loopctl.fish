# SPDX-License-Identifier: LGPL-2.1-or-later
# loopctl's completion for fish.

# The devices that are bound, and their files. Users choose the names of those: a second line would be
# a candidate, and a terminal obeys control characters (\p{C}, with what has no picture).
function __loopctl_devices
    for device in /sys/block/loop*/loop
        set -l name (string replace --regex '.*/(loop\d+)/loop$' '$1' $device)
        set -l file (cat $device/backing_file 2>/dev/null | string collect)
        printf '/dev/%s\t%s\n' $name (string replace --all --regex '\p{C}' '?' -- "$file")
    end
end

# Whether the command is one of these, and the command that it runs is not begun.
function __loopctl_in
    set -l words (commandline -opc)
    contains -- -- $words; and return 1
    for word in $words[2..]
        if not string match --quiet -- '-*' $word
            contains -- $word $argv
            return
        end
    end
    return 1
end

# Whether no command has been named.
function __loopctl_first
    not string match --quiet --invert -- '-*' (commandline -opc)[2..]
end

# Whether the command that is to be run is what is typed now.
function __loopctl_runs
    set -l words (commandline -opc)
    contains -- -- $words; and string match --quiet --regex '^(run|open)$' -- $words[2..]
end

function __loopctl_command
    set -l words (commandline -opc)
    set -l index (contains --index -- -- $words)
    complete -C (string join ' ' -- (string escape -- $words[(math $index + 1)..]) (commandline -ct))
end

function __loopctl_columns
    set -l word (commandline -ct)
    set -l before (string match --regex -- '.*[,+]' $word)
    for name in NAME AUTOCLEAR BACK-FILE BACK-INO BACK-MAJ:MIN MAJ:MIN OFFSET PARTSCAN RO \
            SIZELIMIT DIO LOG-SEC REF SIZE OWNER LIFETIME STATE HOLDER HOLDS LOCK DISKSEQ \
            ATTACHED PARTITIONS
        echo "$before$name"
    end
end

complete -c loopctl -f
complete -c loopctl -n __loopctl_first -s V -l version -d 'Print the version'
complete -c loopctl -n __loopctl_first -a attach -d 'Attach a file'
complete -c loopctl -n __loopctl_first -a hold -d 'Attach a file, and stay until stopped'
complete -c loopctl -n __loopctl_first -a detach -d 'Detach devices'
complete -c loopctl -n __loopctl_first -a resize -d 'Take up a new size, or set offset and limit'
complete -c loopctl -n __loopctl_first -a rescan -d 'Bring the partitions in step with the table'
complete -c loopctl -n __loopctl_first -a list -d 'List all loop devices, or one'
complete -c loopctl -n __loopctl_first -a show -d 'Tell all about a device'
complete -c loopctl -n __loopctl_first -a set -d 'Change a device'
complete -c loopctl -n __loopctl_first -a open -d 'Run a command that has the device open'
complete -c loopctl -n __loopctl_first -a monitor -d 'Tell of devices as they come and go'
complete -c loopctl -n __loopctl_first -a run -d 'Attach a file for as long as a command runs'

set -l all attach hold detach resize rescan list show set open monitor run
complete -c loopctl -n "__loopctl_first; or __loopctl_in $all" -s h -l help -d 'Show help'
complete -c loopctl -n "__loopctl_in $all" -s J -l json -d 'Tell the result as JSON'
complete -c loopctl -n "__loopctl_in $all" -l no-ask-password -d 'Ask nobody for a password'

set -l files attach hold run
complete -c loopctl -n "__loopctl_in $files" -F
complete -c loopctl -n "__loopctl_in $files" -s r -l read-only -d 'Take no writes'
complete -c loopctl -n "__loopctl_in $files resize list" -s o -l offset -x -d 'Where in the file it starts'
complete -c loopctl -n "__loopctl_in $files resize" -l sizelimit -x -d 'At most so much'
complete -c loopctl -n "__loopctl_in $files set" -s b -l sector-size -x -d 'Of the device'
complete -c loopctl -n "__loopctl_in $files" -s P -l partscan -d 'Make devices for the partitions'
complete -c loopctl -n "__loopctl_in $files set" -l direct-io -d 'Go past the page cache'
complete -c loopctl -n "__loopctl_in $files set" -l direct-io=on -d 'Go past the page cache'
complete -c loopctl -n "__loopctl_in $files set" -l direct-io=off -d 'Go through the page cache'
complete -c loopctl -n "__loopctl_in hold" -l default-loop-ref -x -d 'A name, if it is not too long'
complete -c loopctl -n "__loopctl_in $files set" -l loop-ref -x -d 'A name for the device'
complete -c loopctl -n "__loopctl_in $files" -l lock -x -a 'shared exclusive' -d 'Keep udev off'
complete -c loopctl -n "__loopctl_in $files" -l number -x -d '/dev/loopN and no other'
complete -c loopctl -n "__loopctl_in $files resize" -l allow-overlap -d 'Even if another has the same bytes'
complete -c loopctl -n "__loopctl_in $files" -s L -l nooverlap -d 'Not if another has the same bytes'
complete -c loopctl -n "__loopctl_in $files" -l in-memory -d 'Attach a copy'
complete -c loopctl -n "__loopctl_in $files rescan open" -l no-settle -d 'Do not wait for udev'
complete -c loopctl -n '__loopctl_in attach' -l lifetime -x -a 'connection user system' -d 'How long it stays'

complete -c loopctl -n '__loopctl_in detach resize rescan list show set open' -F -a '(__loopctl_devices)'
complete -c loopctl -n '__loopctl_in detach' -l all -d 'All that are yours'
complete -c loopctl -n '__loopctl_in detach' -l lazy -d 'Also what is mounted'
complete -c loopctl -n '__loopctl_in detach list' -s j -l associated -r -F -d 'Those that have this file'
complete -c loopctl -n '__loopctl_in list' -s O -l output -x -a '(__loopctl_columns)' -d Columns
complete -c loopctl -n '__loopctl_in list' -l output-all -d 'All columns'
complete -c loopctl -n '__loopctl_in list' -s n -l noheadings -d 'No line of headings'
complete -c loopctl -n '__loopctl_in list' -l bytes -d 'Sizes in bytes'
complete -c loopctl -n '__loopctl_in list' -l raw -d 'One space between columns'
complete -c loopctl -n '__loopctl_in resize' -l force -d 'Even while it is in use'
complete -c loopctl -n '__loopctl_in set' -l lifetime -x -a 'user system' -d 'How long it stays'
complete -c loopctl -n '__loopctl_in set' -l autoclear -x -a 'on off' -d 'Detach at the last close'
complete -c loopctl -n '__loopctl_in open' -s w -l read-write -d 'For writing, too'
complete -c loopctl -n '__loopctl_in open' -l partition -x -d 'This partition, not the whole'
complete -c loopctl -n __loopctl_runs -a '(__loopctl_command)'
