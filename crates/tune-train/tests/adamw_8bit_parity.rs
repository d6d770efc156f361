//! AdamW with 8-bit moments against bitsandbytes: four steps of `tests/parity/adamw_8bit`, each from its own state.
//!
//! On the CPU, bitsandbytes finds a level that is up to 2e-5 of the block's largest value farther away than the nearest
//! one, which is ours; and it takes weight decay after the update instead of before it.

use std::fs;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::SafeTensors;
use tune_kernels::Moments8bit;
use tune_kernels::adamw_8bit::Codes;
use tune_train::{AdamW, AdamWConfig, Moments};

const SHAPE: [usize; 2] = [8, 512];
const STEPS: usize = 4;

struct Fixture(Vec<u8>);

impl Fixture {
    fn read() -> Self {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/adamw_8bit/run.safetensors");
        Self(fs::read(path).expect("fixture"))
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).expect("valid").tensor(name).expect("there").data().to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.bytes(name).as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    fn gradient(&self, step: usize) -> Vec<f32> {
        let halves = self.bytes(&format!("{step}.gradient"));
        halves
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16))
            .collect()
    }

    fn moments(&self, step: usize) -> Moments8bit {
        let part = |n: u32| Codes {
            codes: self.bytes(&format!("{step}.state{n}")),
            absmax: self.floats(&format!("{step}.absmax{n}")),
        };
        Moments8bit { m: part(1), v: part(2) }
    }
}

fn tensor(values: Vec<f32>) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, SHAPE), &Device::flex())
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn steps_equal_those_of_bitsandbytes() {
    let fixture = Fixture::read();
    for step in 1..=STEPS {
        let start = if step == 1 { "start".into() } else { format!("{}.parameter", step - 1) };
        let start = fixture.floats(&start);
        let mut parameter = tensor(start.clone());
        let mut adam = if step == 1 {
            AdamW::new_8bit(AdamWConfig::default(), [&parameter])
        } else {
            let moments = vec![Moments::Bits8(fixture.moments(step - 1))];
            AdamW::resume(AdamWConfig::default(), step as u64 - 1, moments)
        };
        adam.step(1e-2, vec![&mut parameter], vec![tensor(fixture.gradient(step))]);

        let want = fixture.floats(&format!("{step}.parameter"));
        let got: Vec<f32> = parameter.to_data().iter::<f32>().collect();
        let relative = distance(&got, &want) / distance(&start, &want);
        assert!(relative < 1e-3, "step {step}: off by {relative} of its length");

        let [Moments::Bits8(got)] = adam.moments() else { panic!("moments of 8 bits") };
        let want = fixture.moments(step);
        let before =
            if step == 1 { Moments8bit::zeros(SHAPE[0] * SHAPE[1]) } else { fixture.moments(step - 1) };
        let exact = exact(&before, &fixture.gradient(step));
        let (decoded, theirs) = (got.decode(), want.decode());
        assert_nearest(&decoded.0, &theirs.0, &exact.0, &got.m.absmax);
        assert_nearest(&decoded.1, &theirs.1, &exact.1, &got.v.absmax);
        for (name, got, want) in [("m", &got.m, &want.m), ("v", &got.v, &want.v)] {
            for (got, want) in got.absmax.iter().zip(&want.absmax) {
                assert!(
                    (got - want).abs() <= 1e-6 * want,
                    "step {step}: scale of {name}: {got}, theirs {want}"
                );
            }
        }
    }
}

/// Both moments after a step, not rounded.
fn exact(before: &Moments8bit, gradient: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (m, v) = before.decode();
    let m = m.iter().zip(gradient).map(|(m, g)| 0.9 * m + 0.1 * g).collect();
    (m, v.iter().zip(gradient).map(|(v, g)| 0.999 * v + 0.001 * g * g).collect())
}

/// Ours is as near as theirs, but where it keeps a second moment from becoming zero; and the two are never far apart.
fn assert_nearest(ours: &[f32], theirs: &[f32], exact: &[f32], absmax: &[f32]) {
    for (i, ((ours, theirs), exact)) in ours.iter().zip(theirs).zip(exact).enumerate() {
        let largest = absmax[i / 256];
        let [our_error, their_error] = [ours, theirs].map(|value| (value - exact).abs() / largest);
        assert!(our_error <= their_error + 4e-7, "value {i}: {ours}, theirs {theirs}, exactly {exact}");
        assert!(their_error - our_error <= 3e-5, "value {i}: {ours}, theirs {theirs}, exactly {exact}");
    }
}

#[test]
fn levels_are_those_of_bitsandbytes() {
    let fixture = Fixture::read();
    let all: Vec<u8> = (0..=255).collect();
    let codes = Codes { codes: all, absmax: vec![1.0] };
    let (m, v) = Moments8bit { m: codes.clone(), v: codes }.decode();
    for (got, want) in [(m, fixture.floats("levels1")), (v, fixture.floats("levels2"))] {
        assert!(got.iter().zip(&want).all(|(got, want)| (got - want).abs() <= 2e-7 * want.abs()));
    }
}
