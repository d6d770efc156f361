//! Model families built from shared layers.
