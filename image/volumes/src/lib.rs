//! `podvm-volumes`: the disks of a pod VM. The agent has no right to mount; it asks this program over a unix socket.
