# shellcheck shell=bash
# What the launch scripts share. Sourced by them, after they have set `program` (their name) and `dry_run` (true or false).

exec 3>&1 # where a dry run prints: a command inside $(...) is printed too

# usage_error MESSAGE: ends with status 2.
usage_error() {
    printf '%s: %s\n' "${program:?}" "$1" >&2
    exit 2
}

# fail MESSAGE: ends with status 1.
fail() {
    printf '%s: %s\n' "${program:?}" "$1" >&2
    exit 1
}

say() {
    printf '%s: %s\n' "${program:?}" "$*" >&2
}

# quoted WORD...: the words as a line that a shell reads as the same words.
quoted() {
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
}

# run COMMAND...: runs it; in a dry run, prints it.
run() {
    if ${dry_run:?}; then
        quoted "$@" >&3
    else
        "$@" 3>&-
    fi
}

# query ANSWER COMMAND...: what the command prints; in a dry run prints the command, and takes ANSWER for its output.
query() {
    local answer=$1
    shift
    if ${dry_run:?}; then
        quoted "$@" >&3
        printf '%s\n' "$answer"
    else
        "$@" 3>&-
    fi
}

# pause SECONDS: waits; in a dry run does not.
pause() {
    ${dry_run:?} || sleep "$1"
}

# needs COMMAND HINT: the command is there, or this is a dry run.
needs() {
    ${dry_run:?} || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

# check NAME VALUE PATTERN WHAT: the value of --NAME is given and matches the whole extended regular expression.
check() {
    [[ -n $2 ]] || usage_error "--$1 is missing: --$1=$4"
    [[ $2 =~ ^($3)$ ]] || usage_error "--$1=$2 is not right: --$1=$4"
}

# unknown ARGUMENT: what the option loop says of an argument that it does not know.
unknown() {
    case $1 in
        --config* | --workdir* | --data_dir* | --overwrite) usage_error "$1 is for jaxmodels train: put it after --" ;;
        --*=*) usage_error "unknown option ${1%%=*}; see --help" ;;
        --*) usage_error "unknown option $1 (options are written --NAME=VALUE); see --help" ;;
        *) usage_error "unknown argument '$1'; what goes to jaxmodels train stands after --; see --help" ;;
    esac
}

# check_train ARGUMENT...: what will go to jaxmodels train can be started somewhere else than here.
check_train() {
    local argument has_config=false
    for argument in "$@"; do
        case $argument in
            --config | --config=*) has_config=true ;;
            --workdir=*://*) usage_error "$argument: the run folder is no URL; mount the bucket with --bucket=BUCKET, and take --workdir=runs/NAME" ;;
            --processes* | --process=* | --coordinator*) usage_error "$argument: this script says which processes there are; leave it out" ;;
        esac
    done
    $has_config || usage_error "no --config after --: end the command with -- --config=configs/NAME.py"
}

# check_variable NAME=VALUE: an environment variable.
check_variable() {
    [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || usage_error "--env=$1 is not right: --env=NAME=VALUE"
}

# has_option NAME ARGUMENT...: whether --NAME is among the arguments.
has_option() {
    local name=$1 argument
    shift
    for argument in "$@"; do
        [[ $argument == "--$name" || $argument == "--$name="* ]] && return 0
    done
    return 1
}
