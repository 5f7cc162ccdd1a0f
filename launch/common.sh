# shellcheck shell=bash
# Functions shared by the launch scripts. A script sets `program` (its name) and `dry_run` (true or false), then sources this file.

exec 3>&1 # output of a dry run, so that commands inside $(...) are printed too

# usage_error MESSAGE: exit with status 2.
usage_error() {
    printf '%s: %s\n' "${program:?}" "$1" >&2
    exit 2
}

# fail MESSAGE: exit with status 1.
fail() {
    printf '%s: %s\n' "${program:?}" "$1" >&2
    exit 1
}

say() {
    printf '%s: %s\n' "${program:?}" "$*" >&2
}

# quoted WORD...: print the words as one line, quoted for the shell.
quoted() {
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
}

# run COMMAND...: run the command; in a dry run, print it.
run() {
    if ${dry_run:?}; then
        quoted "$@" >&3
    else
        "$@" 3>&-
    fi
}

# query ANSWER COMMAND...: run the command; in a dry run, print the command and use ANSWER as its output.
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

# pause SECONDS: sleep, except in a dry run.
pause() {
    ${dry_run:?} || sleep "$1"
}

# needs COMMAND HINT: fail unless the command is installed or this is a dry run.
needs() {
    ${dry_run:?} || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

# check NAME VALUE PATTERN WHAT: fail unless --NAME has a value that matches the whole extended regular expression.
check() {
    [[ -n $2 ]] || usage_error "--$1 is missing: --$1=$4"
    [[ $2 =~ ^($3)$ ]] || usage_error "--$1=$2 is invalid: --$1=$4"
}

# unknown ARGUMENT: fail with a hint for an unknown argument.
unknown() {
    case $1 in
        --config* | --workdir* | --data_dir* | --overwrite) usage_error "$1 is an argument of jaxmodels train: put it after --" ;;
        --*=*) usage_error "unknown option ${1%%=*}; see --help" ;;
        --*) usage_error "unknown option $1 (options are written --NAME=VALUE); see --help" ;;
        *) usage_error "unknown argument '$1'; arguments of jaxmodels train come after --; see --help" ;;
    esac
}

# check_train ARGUMENT...: fail if these arguments of jaxmodels train cannot work on other machines.
check_train() {
    local argument has_config=false
    for argument in "$@"; do
        case $argument in
            --config | --config=*) has_config=true ;;
            --workdir=gs://?* | --workdir=s3://?*) ;;
            --workdir=*://*) usage_error "$argument: the run folder is a folder, gs://BUCKET/NAME or s3://BUCKET/NAME" ;;
            --processes* | --process=* | --coordinator*) usage_error "$argument: this script sets the processes; remove it" ;;
        esac
    done
    $has_config || usage_error "no --config after --: end the command with -- --config=configs/NAME.py"
}

# has_remote_workdir ARGUMENT...: whether these arguments of jaxmodels train name a run folder in a bucket.
has_remote_workdir() {
    [[ " $* " == *" --workdir=gs://"* || " $* " == *" --workdir=s3://"* ]]
}

# check_variable NAME=VALUE: fail unless this is an environment variable.
check_variable() {
    [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || usage_error "--env=$1 is invalid: --env=NAME=VALUE"
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
