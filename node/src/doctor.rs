//! `doctor`: what is wrong with this node or a pod, and what to do about it.
