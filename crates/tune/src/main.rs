//! Fine-tune local language models on hardware you own.
fn main() {}
