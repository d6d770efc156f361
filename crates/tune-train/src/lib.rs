//! Supervised fine-tuning: the run, optimiser, schedule, checkpoint, events.
