//! Frozen weights and the operations with hand-written backward.
