# SPDX-License-Identifier: LGPL-2.1-or-later
# loopctl's completion for bash, with the package bash-completion or without it.
# shellcheck shell=bash disable=SC2207 # what is split is words that have no spaces

# The devices that are bound, as /dev/loop3, or as loop3 for who begins like that.
_loopctl_devices() {
    local device prefix=/dev/
    [[ $1 == l* ]] && prefix=
    for device in /sys/block/loop*/loop; do
        device=${device%/loop}
        [[ -e $device ]] && printf '%s\n' "$prefix${device##*/}"
    done
}

# Not those with a newline in their names, of which each line would be a candidate.
_loopctl_files() {
    local IFS=$'\n'
    compopt -o filenames 2>/dev/null
    COMPREPLY+=($(compgen -f -X $'*\n*' -- "$1"))
}

_loopctl_options() {
    printf '%s\n' -h --help -J --json --no-ask-password
    case $1 in
        attach | hold | run)
            printf '%s\n' -r --read-only -o --offset --sizelimit -b --sector-size -P --partscan \
                --direct-io --loop-ref --lock --number --allow-overlap -L --nooverlap --in-memory \
                --no-settle
            ;;&
        attach) echo --lifetime ;;
        hold) echo --default-loop-ref ;;
        detach) printf '%s\n' --all -j --associated --lazy ;;
        list)
            printf '%s\n' -j --associated -o --offset -O --output --output-all -n --noheadings \
                --bytes --raw
            ;;
        open) printf '%s\n' -w --read-write --partition --no-settle ;;
        rescan) echo --no-settle ;;
        resize) printf '%s\n' -o --offset --sizelimit --force --allow-overlap ;;
        set)
            printf '%s\n' --direct-io --loop-ref -b --sector-size --lifetime --autoclear
            ;;
    esac
}

_loopctl_columns="NAME AUTOCLEAR BACK-FILE BACK-INO BACK-MAJ:MIN MAJ:MIN OFFSET PARTSCAN RO \
SIZELIMIT DIO LOG-SEC REF SIZE OWNER LIFETIME STATE HOLDER HOLDS LOCK DISKSEQ ATTACHED PARTITIONS"

# The values of option $2 of command $1, for the word $3; false if it takes none.
_loopctl_value() {
    local values before
    case $2 in
        --lifetime)
            values="user system"
            [[ $1 == attach ]] && values="connection $values"
            ;;
        --lock) values="shared exclusive" ;;
        --autoclear) values="on off" ;;
        -j | --associated)
            _loopctl_files "$3"
            return 0
            ;;
        -O | --output)
            before=${3%"${3##*[,+]}"}
            COMPREPLY=($(compgen -P "$before" -W "$_loopctl_columns" -- "${3##*[,+]}"))
            compopt -o nospace 2>/dev/null
            return 0
            ;;
        -o | --offset | --sizelimit | -b | --sector-size | --loop-ref | --default-loop-ref | --number | --partition) ;;
        *) return 1 ;;
    esac
    COMPREPLY=($(compgen -W "$values" -- "$3"))
    return 0
}

_loopctl() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} command="" index
    COMPREPLY=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        if [[ ${COMP_WORDS[index]} == -- ]]; then
            if [[ $command != run && $command != open ]]; then
                break
            elif declare -F _command_offset >/dev/null; then
                _command_offset $((index + 1))
            elif ((index + 1 == COMP_CWORD)); then
                COMPREPLY=($(compgen -c -- "$word"))
            else
                _loopctl_files "$word"
            fi
            return
        fi
        [[ -z $command && ${COMP_WORDS[index]} != -* ]] && command=${COMP_WORDS[index]}
    done
    if [[ -z $command ]]; then
        COMPREPLY=($(compgen -W "attach hold detach resize rescan list show set open monitor run \
            --help --version" -- "$word"))
        return
    fi
    # Bash takes an equals sign for a word of its own.
    if [[ $word == "=" ]]; then
        word=""
    elif [[ $before == "=" ]]; then
        before=${COMP_WORDS[COMP_CWORD - 2]}
    else
        _loopctl_value "$command" "$before" "$word" && return
        if [[ $word == -* && " ${COMP_WORDS[*]:1:COMP_CWORD-1} " != *" -- "* ]]; then
            COMPREPLY=($(compgen -W "$(_loopctl_options "$command")" -- "$word"))
            return
        fi
        case $command in
            attach | hold | run) _loopctl_files "$word" ;;
            detach | resize | rescan | list | show | set | open)
                COMPREPLY=($(compgen -W "$(_loopctl_devices "$word")" -- "$word"))
                _loopctl_files "$word"
                ;;
        esac
        return
    fi
    if [[ $before == --direct-io ]]; then # which takes a value no other way
        COMPREPLY=($(compgen -W "on off" -- "$word"))
    else
        _loopctl_value "$command" "$before" "$word"
    fi
}

complete -F _loopctl loopctl
