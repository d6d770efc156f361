//! Low-rank updates beside frozen linear layers.
