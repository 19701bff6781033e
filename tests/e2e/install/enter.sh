# The machine of tests/e2e/install.rs: private file systems where an installation writes, below the directory $1. It
# stays until it is killed, and with it, as the first process of its namespace, every other process in it.
set -eu
for directory in etc run usr/local var; do
    mount --bind "$1/$directory" "/$directory"
done
echo mounted
exec sleep 3600
