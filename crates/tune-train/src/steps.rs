//! Which micro-batches make up which optimizer step. Decided before the first step, from data and seed alone,
//! so that a resumed run continues the very same list.
