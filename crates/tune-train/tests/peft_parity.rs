//! Ten optimizer steps, equal to those of PEFT and torch in float32 from the same adapter and batches.
//!
//! Fixtures and tolerances: `tests/parity/README.md`.

mod support;

use support::{Run, Tensors, folder, tensors};
use tune_kernels::Arithmetic;

fn ten_steps(name: &str, kept_blocks: usize) {
    let run = Run::read(name);
    let taken = run.take(Arithmetic::F32, kept_blocks);
    for (number, step) in run.steps.iter().enumerate() {
        assert_relative(&format!("loss of step {}", number + 1), taken.losses[number], step.loss);
        let what = format!("gradient norm of step {}", number + 1);
        assert_relative(&what, taken.grad_norms[number], step.grad_norm);
    }
    assert_tensors("gradient", &taken.gradients, &tensors(&folder(name).join("gradients.safetensors")), true);
    let last = tensors(&folder(name).join("final/adapter_model.safetensors"));
    assert_tensors("final", &taken.adapter, &last, false);
}

fn assert_relative(what: &str, got: f64, want: f64) {
    assert!((got - want).abs() <= 1e-4 * want.abs(), "{what}: got {got}, want {want}, tolerance 1e-4");
}

/// Compares every tensor, with a tolerance relative to its largest entry or absolute.
fn assert_tensors(what: &str, got: &Tensors, want: &Tensors, relative: bool) {
    assert!(got.keys().eq(want.keys()), "{what}: names of the tensors");
    for (name, got) in got {
        let want = &want[name];
        let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        let tolerance = if relative { 1e-4 * largest } else { 1e-4 };
        for (at, (g, w)) in got.iter().zip(want).enumerate() {
            assert!(
                (g - w).abs() <= tolerance,
                "{what} {name}[{at}]: got {g}, want {w}, tolerance {tolerance}"
            );
        }
    }
}

#[test]
fn ten_plain_steps_equal_peft() {
    ten_steps("plain", 0);
}

#[test]
fn ten_clipped_accumulated_steps_equal_peft() {
    ten_steps("clipped", 0);
}

#[test]
fn however_many_blocks_keep_their_graph_the_steps_are_the_same() {
    for kept_blocks in [1, usize::MAX] {
        ten_steps("plain", kept_blocks);
    }
}
