#!/bin/sh
# Make a tree the served one, or go back to an earlier release, by switching one link.
#
#   release.sh ROOT NAME TREE   copy TREE to ROOT/releases/NAME, check it, switch
#   release.sh ROOT NAME        switch to a release that is there
#
#   ROOT/current  ->  releases/NAME
#
# SERVE_BASE, where it is set, names the base that every node has to fit.
set -eu

fail() {
    echo "release.sh: $1" >&2
    exit 1
}

[ $# -eq 2 ] || [ $# -eq 3 ] || fail "usage: release.sh ROOT NAME [TREE]"
root=$1
name=$2
case $name in
    '' | .* | */*) fail "'$name' is no name of a release: it is a folder in releases/" ;;
esac
release=$root/releases/$name

if [ $# -eq 3 ]; then
    [ ! -e "$release" ] || fail "$release is there already: a release is never changed"
    mkdir -p "$root/releases"
    staged=$root/releases/.$name.$$
    trap 'rm -rf "$staged"' EXIT
    trap 'exit 1' INT TERM
    mkdir "$staged"
    # Hidden folders stay behind: earlier versions and training runs are not served.
    cp -Rp "$3"/* "$staged"
    lora-tree check "$staged" ${SERVE_BASE:+--base "$SERVE_BASE"} >&2 ||
        fail "not released; stale nodes are accepted with: lora-tree lock --accept-stale $3"
    sync  # every file is on the disk before the link leads to it
    mv "$staged" "$release"
fi

[ -d "$release" ] || fail "there is no release $release"
before=none
[ ! -L "$root/current" ] || before=$(readlink "$root/current")
# A rename is atomic: at no moment is there no link, or half of one.
ln -s "releases/$name" "$root/.current.$$"
mv -T "$root/.current.$$" "$root/current"
echo "current is releases/$name; before: $before"
