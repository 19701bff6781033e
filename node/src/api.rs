//! The API of the node's service: HTTP on a unix socket, for launchers other than cloud-api-adaptor and for the command
//! line.
