//! The linear layers that read one input, with what comes before and after them, as one operation.
//!
//! ```text
//! u = x                          y = [u Wᵢᵀ + sᵢ (u Aᵢᵀ) Bᵢᵀ + biasᵢ]ᵢ (+ residual)
//!   | RMSNorm(x)
//!   | silu(gate) ⊙ up            x = [gate, up]
//! ```
//!
//! u `[tokens, d_in]`; Wᵢ `[d_outᵢ, d_in]` frozen or trained; Aᵢ `[rᵢ, d_in]`, Bᵢ `[d_outᵢ, rᵢ]` in `f32`; y
//! `[tokens, Σ d_outᵢ]`, `bf16`, or `f32` where a residual in `f32` is added. In a decoder block: q, k, v behind
//! the first norm; o beside the residual; gate and up behind the second norm; down behind the activation.
//!
//! ```text
//! dhᵢ = sᵢ dyᵢ Bᵢ      du = Σᵢ dyᵢ Wᵢ + dhᵢ Aᵢ      dAᵢ = dhᵢᵀ u      dBᵢ = sᵢ dyᵢᵀ (u Aᵢᵀ)
//! dWᵢ = dyᵢᵀ u         dbiasᵢ = Σₜ dyᵢ              dgain = Σₜ du ⊙ x / rms(x)
//! ```
//!
//! Hu et al. 2021, arXiv 2106.09685, eq. 3; Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4; Shazeer 2020,
//! arXiv 2002.05202, eq. 6. Saved: x (for a norm, x divided by its root mean square, in `bf16`, and one value a
//! token) and s u Aᵀ; u is made again from it. A layer without an adapter has a pair of rank 0; a trained one has none.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{DType, Device, Tensor};
use burn_flex::FlexTensor;
use half::bf16;

use super::convert::{round, round_row, transposed, widen};
use super::product::{Factor, Operand, Product, Source, Term, Tile, run};
use crate::cpu::{self, SharedSlots, Unwritten, exp, for_each, map, prefetch_part, vectorised};
use crate::{FrozenVector, FrozenWeight, Vector, Weight};

/// What the layers read.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "made for one projection and taken apart there")]
pub enum Input {
    /// `bf16` `[tokens, d_in]`, as it is.
    Plain(Tensor<2>),
    /// The root-mean-square norm of `x`, `f32` `[tokens, d_in]`.
    Norm {
        /// The residual stream.
        x: Tensor<2>,
        /// `[d_in]`.
        gain: Vector,
        /// Added to the mean square.
        eps: f32,
    },
    /// `silu(gate) ⊙ up` of `[gate, up]`, `bf16` `[tokens, 2 · d_in]`.
    SwiGlu(Tensor<2>),
}

/// One linear layer.
#[derive(Clone)]
pub struct Layer {
    /// `[d_out, d_in]`.
    pub weight: Weight,
    /// `[d_out]`; trained if and only if the weight is.
    pub bias: Option<Vector>,
    /// A `[rank, d_in]`, B `[d_out, rank]` and the factor s; never beside a trained weight.
    pub adapter: Option<(Tensor<2>, Tensor<2>, f32)>,
}

/// Most layers of one projection: q, k and v.
const MOST_LAYERS: usize = 3;

/// The outputs of `layers` side by side, `bf16`; or the output plus `residual` (`f32`), `f32`.
///
/// # Panics
/// When the shapes do not agree, there are no layers or more than three, or a layer is trained in part.
pub fn project(input: Input, layers: &[Layer], residual: Option<Tensor<2>>) -> Tensor<2> {
    let (x, transform, gain) = match input {
        Input::Plain(x) => (x, Transform::Plain, None),
        Input::Norm { x, gain, eps } => {
            (x, Transform::Norm { gain: gain.values(), eps }, gain.trained().cloned())
        }
        Input::SwiGlu(x) => (x, Transform::SwiGlu, None),
    };
    let [tokens, width] = x.dims();
    if let Transform::Norm { gain, .. } = &transform {
        assert_eq!(gain.len(), width, "project: gain for x [{tokens}, {width}]");
    }
    let d_in = if matches!(transform, Transform::SwiGlu) { width / 2 } else { width };
    assert!((1..=MOST_LAYERS).contains(&layers.len()), "project: {} layers", layers.len());
    let device = x.device().inner();
    let mut pairs = Vec::with_capacity(2 * MOST_LAYERS);
    for layer in layers {
        let w = &layer.weight;
        assert_eq!(w.cols(), d_in, "project: d_in of {w:?} for x [{tokens}, {width}]");
        if let Some(bias) = &layer.bias {
            assert_eq!(bias.values().len(), w.rows(), "project: bias of {w:?}");
        }
        let bias = layer.bias.as_ref().and_then(Vector::trained);
        assert!(w.trained().is_some() || bias.is_none(), "project: a trained bias of {w:?}");
        match (&layer.adapter, w.trained()) {
            (Some(_), Some(_)) => panic!("project: an adapter beside the trained {w:?}"),
            (None, Some(w)) => {
                pairs.extend([w.clone(), bias.cloned().unwrap_or_else(|| Tensor::empty([0, 0], &device))]);
            }
            (Some((a, b, _)), None) => {
                let rank = a.dims()[0];
                assert_eq!(a.dims(), [rank, d_in], "project: A for {w:?}");
                assert_eq!(b.dims(), [w.rows(), rank], "project: B for {w:?} and A {:?}", a.dims());
                pairs.extend([a.clone(), b.clone()]);
            }
            (None, None) => pairs.extend(no_pair(w.rows(), d_in, &device)),
        }
    }
    pairs.resize_with(2 * MOST_LAYERS, || Tensor::empty([0, 0], &device));
    let d_out: usize = layers.iter().map(|layer| layer.weight.rows()).sum();
    if let Some(residual) = &residual {
        assert_eq!(residual.dims(), [tokens, d_out], "project: residual");
    }
    let spec = Arc::new(Spec {
        transform,
        layers: layers
            .iter()
            .map(|layer| LayerSpec {
                weight: layer.weight.stored(),
                bias: layer.bias.as_ref().map(Vector::values),
                is_trained: layer.weight.trained().is_some(),
                scale: layer.adapter.as_ref().map_or(0.0, |(_, _, scale)| *scale),
            })
            .collect(),
        has_residual: residual.is_some(),
    });
    let [residual, gain] = [residual, gain].map(|t| t.unwrap_or_else(|| Tensor::empty([0, 0], &device)));
    // What is not in the graph is a constant of it.
    let tracked = [&x, &residual, &gain].into_iter().chain(&pairs).any(Tensor::is_autodiff);
    let primitive = |t: Tensor<2>| if tracked { t.autodiff() } else { t }.into_dispatch();
    let mut pairs = pairs.into_iter().map(primitive);
    let mut next = || pairs.next().expect("two for each of the layers");
    Tensor::from_dispatch(<Dispatch as Project>::project(
        primitive(x),
        primitive(residual),
        primitive(gain),
        next(),
        next(),
        next(),
        next(),
        next(),
        next(),
        spec,
    ))
}

fn no_pair(d_out: usize, d_in: usize, device: &Device) -> [Tensor<2>; 2] {
    [Tensor::empty([0, d_in], device), Tensor::empty([d_out, 0], device)]
}

/// [`project`] in plain operations in `f32`, with the whole weights decoded.
pub fn reference(input: Input, layers: &[Layer], residual: Option<Tensor<2>>) -> Tensor<2> {
    let u = match input {
        Input::Plain(x) => x,
        Input::Norm { x, gain, eps } => match gain {
            Vector::Frozen(gain) => crate::rms_norm::reference(x, &gain, eps),
            Vector::Trained(gain) => {
                crate::rms_norm::reference(x, &vec![1.0; gain.dims()[1]].into(), eps) * gain
            }
        },
        Input::SwiGlu(x) => {
            let d_ff = x.dims()[1] / 2;
            let [gate, up] = [0, d_ff].map(|first| x.clone().narrow(1, first, d_ff));
            crate::swiglu::reference(gate, up)
        }
    };
    let of_layer = |layer: &Layer| {
        let y = match (&layer.weight, &layer.adapter) {
            (Weight::Trained(w), _) => u.clone().matmul(w.clone().transpose()),
            (Weight::Frozen(w), Some((a, b, scale))) => {
                crate::lora_linear::reference(u.clone(), w, a.clone(), b.clone(), *scale)
            }
            (Weight::Frozen(w), None) => crate::frozen_linear::reference(u.clone(), w),
        };
        match &layer.bias {
            Some(Vector::Trained(bias)) => y + bias.clone(),
            Some(Vector::Frozen(bias)) => y.clone() + bias.tensor(&y.device()).unsqueeze(),
            None => y,
        }
    };
    let y = Tensor::cat(layers.iter().map(of_layer).collect(), 1);
    match residual {
        Some(residual) => y + residual,
        None => y,
    }
}

/// Everything about a projection that is not a tensor.
#[derive(Debug)]
pub(crate) struct Spec {
    transform: Transform,
    layers: Vec<LayerSpec>,
    has_residual: bool,
}

#[derive(Debug)]
enum Transform {
    Plain,
    Norm { gain: FrozenVector, eps: f32 },
    SwiGlu,
}

#[derive(Debug)]
struct LayerSpec {
    weight: FrozenWeight,
    bias: Option<FrozenVector>,
    is_trained: bool,
    scale: f32,
}

impl Spec {
    fn d_in(&self) -> usize {
        self.layers[0].weight.cols()
    }

    fn d_out(&self) -> usize {
        self.layers.iter().map(|layer| layer.weight.rows()).sum()
    }

    fn is_trained(&self) -> bool {
        self.layers.iter().any(|layer| layer.is_trained)
    }

    /// The columns of y that each layer makes.
    fn columns(&self) -> Vec<Range<usize>> {
        let widths = self.layers.iter().map(|layer| layer.weight.rows());
        widths.scan(0, |end, width| Some(std::mem::replace(end, *end + width)..*end)).collect()
    }
}

/// The differentiable operation.
#[backend_extension(Flex, Autodiff)]
#[allow(clippy::too_many_arguments)]
pub(crate) trait Project: Backend {
    fn project(
        x: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        a0: FloatTensor<Self>,
        b0: FloatTensor<Self>,
        a1: FloatTensor<Self>,
        b1: FloatTensor<Self>,
        a2: FloatTensor<Self>,
        b2: FloatTensor<Self>,
        spec: Arc<Spec>,
    ) -> FloatTensor<Self>;
}

/// The kernels of one backend.
pub(crate) trait ProjectKernels: Backend {
    /// y, and what backward needs.
    fn forward(
        x: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        pairs: [FloatTensor<Self>; 2 * MOST_LAYERS],
        spec: Arc<Spec>,
    ) -> (FloatTensor<Self>, Saved<Self>);
    /// dx if `wants_x`, dgain if `wants_gain`, and of each layer dA and dB, or dW and dbias.
    fn backward(
        saved: Saved<Self>,
        dy: FloatTensor<Self>,
        wants_x: bool,
        wants_gain: bool,
    ) -> ProjectGradients<Self>;
}

/// What backward needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved<B: Backend> {
    /// x; for a norm x divided by its root mean square.
    input: FloatTensor<B>,
    /// `[tokens]` for a norm, else empty.
    inverse_rms: FloatTensor<B>,
    /// s u Aᵀ of all layers, each padded to an even width.
    h: FloatTensor<B>,
    /// A and B of each layer; of a trained one its weight and bias.
    pairs: [FloatTensor<B>; 2 * MOST_LAYERS],
    spec: Arc<Spec>,
}

pub(crate) struct ProjectGradients<B: Backend> {
    x: Option<FloatTensor<B>>,
    gain: Option<FloatTensor<B>>,
    /// In the order of `pairs`.
    pairs: Vec<FloatTensor<B>>,
}

impl Project for Flex {
    fn project(
        x: FlexTensor,
        residual: FlexTensor,
        _gain: FlexTensor,
        a0: FlexTensor,
        b0: FlexTensor,
        a1: FlexTensor,
        b1: FlexTensor,
        a2: FlexTensor,
        b2: FlexTensor,
        spec: Arc<Spec>,
    ) -> FlexTensor {
        Self::forward(x, residual, [a0, b0, a1, b1, a2, b2], spec).0
    }
}

impl ProjectKernels for Flex {
    fn forward(
        x: FlexTensor,
        residual: FlexTensor,
        pairs: [FlexTensor; 2 * MOST_LAYERS],
        spec: Arc<Spec>,
    ) -> (FlexTensor, Saved<Self>) {
        let (x, residual, pairs) =
            (cpu::contiguous(x), cpu::contiguous(residual), pairs.map(cpu::contiguous));
        let [tokens, width] = x.shape().dims();
        let (input, inverse_rms, u) = transform(&x, tokens, width, &spec.transform);
        let u = Shared::of(u.as_deref(), &input);
        let u = u.operand(tokens, spec.d_in());
        let pair_views = Pairs::of(&pairs, &spec);

        let all_a = pair_views.all_a();
        let mut h = Unwritten::<bf16>::new(tokens * pair_views.width);
        let h_slots = SharedSlots::new(h.slots());
        run(&[Product {
            rows: tokens,
            cols: pair_views.width,
            terms: vec![Term { a: u, b: Factor::Transposed(pair_views.source(&all_a)) }],
            finish: Box::new(|tile| {
                let scales = &pair_views.scales[tile.cols.clone()];
                write(h_slots, pair_views.width, 0, &tile, |_, sums, out| {
                    round_scaled_into(sums, scales, out);
                });
            }),
        }]);
        // SAFETY: the tiles cover h.
        #[allow(unsafe_code)]
        let h = unsafe { h.written() };

        let y = if spec.has_residual {
            let residual: &[f32] = cpu::values(&residual);
            output::<f32>(tokens, &spec, &pair_views, u, &h, |row, cols, sums, bias, out| {
                let first = row * spec.d_out() + cols.start;
                prefetch_part(residual, first + ROWS_AHEAD * spec.d_out(), cols.len());
                add_into(sums, bias, &residual[first..first + cols.len()], out);
            })
        } else {
            output::<bf16>(tokens, &spec, &pair_views, u, &h, |_, _, sums, bias, out| {
                round_biased_into(sums, bias, out);
            })
        };
        let h = cpu::from_values(h, [tokens, pair_views.width]);
        (y, Saved { input, inverse_rms, h, pairs, spec })
    }

    #[allow(clippy::too_many_lines, reason = "products that run side by side are listed together")]
    fn backward(
        saved: Saved<Self>,
        dy: FlexTensor,
        wants_x: bool,
        wants_gain: bool,
    ) -> ProjectGradients<Self> {
        let Saved { input, inverse_rms, h, pairs, spec } = saved;
        let dy = cpu::contiguous(dy);
        let [tokens, _] = dy.shape().dims();
        let (d_in, d_out) = (spec.d_in(), spec.d_out());
        let rounded = (dy.dtype() == DType::F32).then(|| rounded(cpu::values(&dy)));
        let dy: &[bf16] = rounded.as_deref().unwrap_or_else(|| cpu::values(&dy));
        let h: &[bf16] = cpu::values(&h);
        let pair_views = Pairs::of(&pairs, &spec);
        let columns = spec.columns();
        let dy_of =
            |layer: usize| Operand::new(&dy[columns[layer].start..], tokens, columns[layer].len(), d_out);

        // dh; columns that only make a width even stay zeros
        let mut dh = vec![bf16::ZERO; tokens * pair_views.width];
        let dh_slots = SharedSlots::new(cpu::as_slots(&mut dh));
        let products: Vec<Product> = pair_views
            .each()
            .map(|pair| Product {
                rows: tokens,
                cols: pair.rank,
                terms: vec![Term { a: dy_of(pair.layer), b: Factor::Plain(pair.b) }],
                finish: Box::new(|tile| {
                    let scales = &pair_views.scales[pair.offset..][tile.cols.clone()];
                    write(dh_slots, pair_views.width, pair.offset, &tile, |_, sums, out| {
                        round_scaled_into(sums, scales, out);
                    });
                }),
            })
            .collect();
        run(&products);
        drop(products);

        // du, and with it u behind an activation, whose gradient knows it
        let wants_du = wants_x || wants_gain;
        let mut du = DInput::new(wants_du, tokens, &spec);
        let all_a = pair_views.all_a();
        let mut of_du = Vec::new();
        for (layer, frozen) in spec.layers.iter().enumerate() {
            let w = Source::Stored(frozen.weight.matrix());
            of_du.push(Term { a: dy_of(layer), b: Factor::Plain(w) });
        }
        if pair_views.width > 0 {
            let dh = Operand::new(&dh, tokens, pair_views.width, pair_views.width);
            of_du.push(Term { a: dh, b: Factor::Plain(pair_views.source(&all_a)) });
        }
        let makes_u = wants_du && matches!(spec.transform, Transform::SwiGlu);
        let u = if makes_u {
            let finish = du.finish(&input, d_in);
            run(&[Product { rows: tokens, cols: d_in, terms: of_du.clone(), finish }]);
            du.take_u()
        } else {
            again(&input, &spec.transform)
        };

        // dA, dB, dW: all that is left is independent
        let u = Shared::of(u.as_deref(), &input);
        let u = Source::Halves { values: u.values(), stride: d_in };
        let depth = tokens.next_multiple_of(2);
        let width = pair_views.width;
        let (h_t, dh_t) = (transposed(h, tokens, width, width), transposed(&dh, tokens, width, width));
        let dy_t = if spec.is_trained() { transposed(dy, tokens, d_out, d_out) } else { Vec::new() };
        let mut of_pairs: Vec<Unwritten> =
            pairs.iter().map(|p| Unwritten::new(p.shape().num_elements())).collect();
        let slots: Vec<SharedSlots> = of_pairs.iter_mut().map(|v| SharedSlots::new(v.slots())).collect();
        let mut products = Vec::new();
        if wants_du && !makes_u {
            let finish = du.finish(&input, d_in);
            products.push(Product { rows: tokens, cols: d_in, terms: of_du, finish });
        }
        if width > 0 {
            products.push(Product {
                rows: width,
                cols: d_in,
                terms: vec![Term { a: Operand::new(&dh_t, width, tokens, depth), b: Factor::Plain(u) }],
                finish: Box::new(|tile| {
                    for pair in pair_views.each() {
                        write_rows(slots[2 * pair.layer], d_in, &tile, pair.offset..pair.offset + pair.rank);
                    }
                }),
            });
        }
        for pair in pair_views.each() {
            let (rank, h, db) = (pair.rank, &h_t[pair.offset * depth..], slots[2 * pair.layer + 1]);
            let dy = Source::Halves { values: &dy[columns[pair.layer].start..], stride: d_out };
            products.push(Product {
                rows: rank,
                cols: columns[pair.layer].len(),
                terms: vec![Term { a: Operand::new(h, rank, tokens, depth), b: Factor::Plain(dy) }],
                finish: Box::new(move |tile| write_transposed(db, rank, &tile)),
            });
        }
        for (layer, columns) in columns.iter().enumerate().filter(|(layer, _)| spec.layers[*layer].is_trained)
        {
            let (dw, dy) = (slots[2 * layer], &dy_t[columns.start * depth..]);
            products.push(Product {
                rows: columns.len(),
                cols: d_in,
                terms: vec![Term { a: Operand::new(dy, columns.len(), tokens, depth), b: Factor::Plain(u) }],
                finish: Box::new(move |tile| {
                    write(dw, d_in, 0, &tile, |_, sums, out| {
                        out.write_copy_of_slice(sums);
                    });
                }),
            });
            // SAFETY: nothing else writes the gradient of this bias.
            #[allow(unsafe_code)]
            let d_bias =
                unsafe { slots[2 * layer + 1].range(0, pairs[2 * layer + 1].shape().num_elements()) };
            d_bias.fill(MaybeUninit::new(0.0)); // without a token there is no row to sum
            sum_rows(dy, depth, d_bias);
        }
        run(&products);
        drop(products);

        let (x, gain) = du.into_gradients(&input, &inverse_rms, &spec, tokens, wants_gain);
        let of_pairs = of_pairs.into_iter().zip(&pairs).map(|(values, parameter)| {
            // SAFETY: the products have written every element of dA, dB and dW, and the loop over layers those of
            // dbias; pairs of rank 0 have none.
            #[allow(unsafe_code)]
            let values = unsafe { values.written() };
            cpu::from_values(values, parameter.shape().dims::<2>())
        });
        ProjectGradients { x, gain, pairs: of_pairs.collect() }
    }
}

/// y, with `finish(row, columns, sums, bias, out)` for each part of a row.
fn output<T: cpu::Value + burn::tensor::Element>(
    tokens: usize,
    spec: &Spec,
    pairs: &Pairs,
    u: Operand,
    h: &[bf16],
    finish: impl Fn(usize, Range<usize>, &[f32], Option<&[f32]>, &mut [MaybeUninit<T>]) + Sync,
) -> FlexTensor {
    let d_out = spec.d_out();
    let mut y = Unwritten::<T>::new(tokens * d_out);
    let slots = SharedSlots::new(y.slots());
    let finish = &finish;
    let products: Vec<Product> = spec
        .layers
        .iter()
        .zip(spec.columns())
        .zip(&pairs.pairs)
        .map(|((frozen, columns), pair)| {
            let w = Source::Stored(frozen.weight.matrix());
            let mut terms = vec![Term { a: u, b: Factor::Transposed(w) }];
            if pair.rank > 0 {
                let h = Operand::new(&h[pair.offset..], tokens, pair.rank, pairs.width);
                terms.push(Term { a: h, b: Factor::Transposed(pair.b) });
            }
            Product {
                rows: tokens,
                cols: columns.len(),
                terms,
                finish: Box::new(move |tile| {
                    let bias = frozen.bias.as_ref().map(|bias| &bias[tile.cols.clone()]);
                    let of_y = columns.start + tile.cols.start..columns.start + tile.cols.end;
                    write(slots, d_out, columns.start, &tile, |row, sums, out| {
                        finish(row, of_y.clone(), sums, bias, out);
                    });
                }),
            }
        })
        .collect();
    run(&products);
    drop(products);
    // SAFETY: the tiles of all layers cover y.
    #[allow(unsafe_code)]
    let y = unsafe { y.written() };
    cpu::from_values(y, [tokens, d_out])
}

/// The low-rank pairs of the layers.
struct Pairs<'a> {
    pairs: Vec<Pair<'a>>,
    /// Columns of h: all ranks, each padded to an even number.
    width: usize,
    d_in: usize,
    /// The factor of each column of h.
    scales: Vec<f32>,
}

struct Pair<'a> {
    layer: usize,
    rank: usize,
    /// First column of h.
    offset: usize,
    a: &'a [f32],
    b: Source<'a>,
}

impl<'a> Pairs<'a> {
    fn of(tensors: &'a [FlexTensor; 2 * MOST_LAYERS], spec: &'a Spec) -> Self {
        let (mut width, mut scales) = (0, Vec::new());
        let pairs = spec.layers.iter().enumerate().map(|(layer, of_layer)| {
            let (a, b) = (&tensors[2 * layer], &tensors[2 * layer + 1]);
            let [rank, _] = a.shape().dims();
            let rank = if of_layer.is_trained { 0 } else { rank };
            let offset = width;
            width += rank.next_multiple_of(2);
            scales.resize(width, of_layer.scale);
            Pair {
                layer,
                rank,
                offset,
                a: cpu::values(a),
                b: Source::Floats { values: cpu::values(b), cols: rank },
            }
        });
        let pairs = pairs.collect();
        Self { pairs, width, d_in: spec.d_in(), scales }
    }

    /// Those of a rank above 0.
    fn each(&self) -> impl Iterator<Item = &Pair<'a>> {
        self.pairs.iter().filter(|pair| pair.rank > 0)
    }

    /// A of all layers one below the other, rounded, `[width, d_in]`: one product with it takes fewer passes over
    /// the other factor than one for each layer.
    fn all_a(&self) -> Vec<bf16> {
        let mut all = vec![bf16::ZERO; self.width * self.d_in];
        for pair in self.each() {
            round_row(pair.a, &mut all[pair.offset * self.d_in..][..pair.a.len()]);
        }
        all
    }

    /// What [`all_a`](Self::all_a) has made as a matrix.
    fn source<'b>(&self, all_a: &'b [bf16]) -> Source<'b> {
        Source::Halves { values: all_a, stride: self.d_in }
    }
}

/// Values that were made here, or those of the saved input where they are the same.
enum Shared<'a> {
    Own(&'a [bf16]),
    Input(&'a FlexTensor),
}

impl<'a> Shared<'a> {
    fn of(own: Option<&'a [bf16]>, input: &'a FlexTensor) -> Self {
        own.map_or(Self::Input(input), Self::Own)
    }

    fn values(&self) -> &'a [bf16] {
        match self {
            Self::Own(values) => values,
            Self::Input(tensor) => cpu::values(tensor),
        }
    }

    fn operand(&self, rows: usize, cols: usize) -> Operand<'a> {
        Operand::new(self.values(), rows, cols, cols)
    }
}

/// What is saved of x, its inverse root mean squares, and u unless it is x.
fn transform(
    x: &FlexTensor,
    tokens: usize,
    width: usize,
    transform: &Transform,
) -> (FlexTensor, FlexTensor, Option<Vec<bf16>>) {
    let none = || cpu::from_values(Vec::<f32>::new(), [0]);
    match transform {
        Transform::Plain => (x.clone(), none(), None),
        Transform::SwiGlu => (x.clone(), none(), again(x, transform)),
        Transform::Norm { gain, eps } => {
            let x: &[f32] = cpu::values(x);
            let (mut scaled, mut u) = (Unwritten::<bf16>::new(x.len()), Unwritten::<bf16>::new(x.len()));
            let mut inverse_rms = Unwritten::<f32>::new(tokens);
            let task = ROWS_OF_A_TASK * width.max(1);
            let outputs = scaled.slots().chunks_mut(task).zip(u.slots().chunks_mut(task));
            let tasks = x.chunks(task).zip(inverse_rms.slots().chunks_mut(ROWS_OF_A_TASK)).zip(outputs);
            for_each(
                tasks.collect(),
                |((x, inverse_rms), (scaled, u)): ((&[f32], &mut [_]), (&mut [_], &mut [_]))| {
                    let rows = scaled.chunks_exact_mut(width).zip(u.chunks_exact_mut(width));
                    for ((x, r), (scaled, u)) in x.chunks_exact(width).zip(inverse_rms).zip(rows) {
                        let inverse_rms = 1.0 / (cpu::dot(x, x) / width as f32 + eps).sqrt();
                        r.write(inverse_rms);
                        normalise(x, inverse_rms, gain, scaled, u);
                    }
                },
            );
            // SAFETY: the loop has written every row and every r.
            #[allow(unsafe_code)]
            let (scaled, u, inverse_rms) = unsafe { (scaled.written(), u.written(), inverse_rms.written()) };
            (cpu::from_values(scaled, [tokens, width]), cpu::from_values(inverse_rms, [tokens]), Some(u))
        }
    }
}

/// u from what was saved, unless it is the same.
fn again(input: &FlexTensor, transform: &Transform) -> Option<Vec<bf16>> {
    let [tokens, width] = input.shape().dims();
    let input: &[bf16] = match transform {
        Transform::Plain => return None,
        Transform::Norm { .. } | Transform::SwiGlu => cpu::values(input),
    };
    let d_in = if matches!(transform, Transform::SwiGlu) { width / 2 } else { width };
    let mut u = Unwritten::<bf16>::new(tokens * d_in);
    let [input_task, u_task] = [width, d_in].map(|cols| ROWS_OF_A_TASK * cols.max(1));
    let tasks = input.chunks(input_task).zip(u.slots().chunks_mut(u_task)).collect();
    for_each(tasks, |(input, u): (&[bf16], &mut [_])| {
        for (input, u) in input.chunks_exact(width).zip(u.chunks_exact_mut(d_in)) {
            match transform {
                Transform::Norm { gain, .. } => multiply_into(input, gain, u),
                Transform::Plain | Transform::SwiGlu => {
                    let (gate, up) = input.split_at(d_in);
                    activate(gate, up, u);
                }
            }
        }
    });
    // SAFETY: the loop has written every row.
    #[allow(unsafe_code)]
    Some(unsafe { u.written() })
}

/// Rows of an element-wise loop that are worth a thread's while.
const ROWS_OF_A_TASK: usize = 16;

/// Rows of which a tile reads a part are asked for so many rows before.
const ROWS_AHEAD: usize = 3;

/// The gradient of x, on its way from that of u.
enum DInput {
    Unwanted,
    Plain(Unwritten<bf16>),
    Norm(Unwritten<f32>),
    /// With u.
    SwiGlu(Unwritten<bf16>, Unwritten<bf16>),
}

impl DInput {
    fn new(wanted: bool, tokens: usize, spec: &Spec) -> Self {
        let len = tokens * spec.d_in();
        match &spec.transform {
            _ if !wanted => Self::Unwanted,
            Transform::Plain => Self::Plain(Unwritten::new(len)),
            Transform::Norm { .. } => Self::Norm(Unwritten::new(len)),
            Transform::SwiGlu => Self::SwiGlu(Unwritten::new(2 * len), Unwritten::new(len)),
        }
    }

    /// Takes tiles of du.
    fn finish<'a>(&'a mut self, input: &'a FlexTensor, d_in: usize) -> Box<dyn Fn(Tile) + Sync + 'a> {
        match self {
            Self::Unwanted => Box::new(|_| {}),
            Self::Plain(dx) => {
                let slots = SharedSlots::new(dx.slots());
                Box::new(move |tile| {
                    write(slots, d_in, 0, &tile, |_, sums, out| round_biased_into(sums, None, out));
                })
            }
            Self::Norm(du) => {
                let slots = SharedSlots::new(du.slots());
                Box::new(move |tile| {
                    write(slots, d_in, 0, &tile, |_, sums, out| {
                        out.write_copy_of_slice(sums);
                    });
                })
            }
            Self::SwiGlu(dx, u) => {
                let (slots, u) = (SharedSlots::new(dx.slots()), SharedSlots::new(u.slots()));
                let input: &[bf16] = cpu::values(input);
                Box::new(move |tile| {
                    for row in tile.rows.clone() {
                        let first = row * 2 * d_in + tile.cols.start;
                        let (gate, up) = (&input[first..], &input[first + d_in..]);
                        let ahead = first + ROWS_AHEAD * 2 * d_in;
                        prefetch_part(input, ahead, tile.cols.len());
                        prefetch_part(input, ahead + d_in, tile.cols.len());
                        // SAFETY: tiles cover C once, so no other task has these columns of gate, up and u.
                        #[allow(unsafe_code)]
                        let (d_gate, d_up, u) = unsafe {
                            let len = tile.cols.len();
                            let u = u.range(row * d_in + tile.cols.start, len);
                            (slots.range(first, len), slots.range(first + d_in, len), u)
                        };
                        activate_backward(tile.row(row), gate, up, d_gate, d_up, u);
                    }
                })
            }
        }
    }

    /// u behind an activation, when all tiles of du have been taken.
    fn take_u(&mut self) -> Option<Vec<bf16>> {
        match self {
            // SAFETY: the tiles have written every element.
            #[allow(unsafe_code)]
            Self::SwiGlu(_, u) => Some(unsafe { std::mem::replace(u, Unwritten::new(0)).written() }),
            _ => None,
        }
    }

    /// dx, and dgain if it is wanted, when all tiles of du have been taken.
    fn into_gradients(
        self,
        input: &FlexTensor,
        inverse_rms: &FlexTensor,
        spec: &Spec,
        tokens: usize,
        wants_gain: bool,
    ) -> (Option<FlexTensor>, Option<FlexTensor>) {
        let d_in = spec.d_in();
        // SAFETY: the tiles have written every element.
        #[allow(unsafe_code)]
        match self {
            Self::Unwanted => (None, None),
            Self::Plain(dx) => (Some(cpu::from_values(unsafe { dx.written() }, [tokens, d_in])), None),
            Self::SwiGlu(dx, _) => {
                (Some(cpu::from_values(unsafe { dx.written() }, [tokens, 2 * d_in])), None)
            }
            Self::Norm(du) => {
                let mut dx = unsafe { du.written() };
                let gain = wants_gain
                    .then(|| cpu::from_values(gain_gradient(&dx, cpu::values(input), d_in), [1, d_in]));
                if let Transform::Norm { gain, .. } = &spec.transform {
                    let task = ROWS_OF_A_TASK * d_in.max(1);
                    let inverse_rms = cpu::values::<f32>(inverse_rms).chunks(ROWS_OF_A_TASK);
                    let tasks =
                        dx.chunks_mut(task).zip(cpu::values::<bf16>(input).chunks(task)).zip(inverse_rms);
                    for_each(
                        tasks.collect(),
                        |((dx, scaled), inverse_rms): ((&mut [f32], &[bf16]), &[f32])| {
                            let rows = dx.chunks_exact_mut(d_in).zip(scaled.chunks_exact(d_in));
                            for ((dx, scaled), r) in rows.zip(inverse_rms) {
                                normalise_backward(dx, scaled, gain, *r);
                            }
                        },
                    );
                }
                (Some(cpu::from_values(dx, [tokens, d_in])), gain)
            }
        }
    }
}

/// The sum of each row of `depth` values.
fn sum_rows(values: &[bf16], depth: usize, sums: &mut [MaybeUninit<f32>]) {
    for (sum, row) in sums.iter_mut().zip(values.chunks_exact(depth.max(1))) {
        sum.write(row.iter().map(|value| f64::from(widen(*value))).sum::<f64>() as f32);
    }
}

/// `Σₜ du ⊙ x̂` with x̂ = x r: sums of groups of rows, then their sum in order.
fn gain_gradient(du: &[f32], scaled: &[bf16], d_in: usize) -> Vec<f32> {
    const ROWS: usize = 64;
    let of_group = |(du, scaled): (&[f32], &[bf16])| {
        let mut sums = vec![0.0; d_in];
        let rows = du.chunks_exact(d_in.max(1)).zip(scaled.chunks_exact(d_in.max(1)));
        rows.for_each(|(du, scaled)| add_product(du, scaled, &mut sums));
        sums
    };
    let len = (ROWS * d_in).max(1);
    let groups: Vec<Vec<f32>> = map(du.chunks(len).zip(scaled.chunks(len)).collect(), of_group);
    let mut sums = vec![0.0; d_in];
    for group in groups {
        sums.iter_mut().zip(group).for_each(|(sum, of_group)| *sum += of_group);
    }
    sums
}

/// Gives each row of a tile and its part of the shared matrix (rows of `stride`, the tile's first column at
/// `first`) to `row`.
fn write<T: cpu::Value>(
    out: SharedSlots<T>,
    stride: usize,
    first: usize,
    tile: &Tile,
    row: impl Fn(usize, &[f32], &mut [MaybeUninit<T>]),
) {
    for r in tile.rows.clone() {
        // SAFETY: tiles cover C once, so no other task has these elements.
        #[allow(unsafe_code)]
        let slots = unsafe { out.range(r * stride + first + tile.cols.start, tile.cols.len()) };
        row(r, tile.row(r), slots);
    }
}

/// Writes the rows `rows` of C, as far as they are in a tile, to a matrix of them.
fn write_rows(out: SharedSlots, cols: usize, tile: &Tile, rows: Range<usize>) {
    for row in tile.rows.start.max(rows.start)..tile.rows.end.min(rows.end) {
        // SAFETY: tiles cover C once, so no other task has these elements.
        #[allow(unsafe_code)]
        let slots = unsafe { out.range((row - rows.start) * cols + tile.cols.start, tile.cols.len()) };
        slots.write_copy_of_slice(tile.row(row));
    }
}

/// Writes a tile of C to the matrix `[cols, rank]` that is its transpose.
fn write_transposed(out: SharedSlots, rank: usize, tile: &Tile) {
    for (i, col) in tile.cols.clone().enumerate() {
        // SAFETY: tiles cover C once, so no other task has these elements.
        #[allow(unsafe_code)]
        let slots = unsafe { out.range(col * rank + tile.rows.start, tile.rows.len()) };
        for (slot, row) in slots.iter_mut().zip(tile.rows.clone()) {
            slot.write(tile.row(row)[i]);
        }
    }
}

fn rounded(values: &[f32]) -> Vec<bf16> {
    const CHUNK: usize = 16 * 1024;
    let mut out = vec![bf16::ZERO; values.len()];
    let tasks = out.chunks_mut(CHUNK).zip(values.chunks(CHUNK)).collect();
    for_each(tasks, |(out, values): (&mut [bf16], &[f32])| round_row(values, out));
    out
}

vectorised! {
    fn round_scaled_into(sums: &[f32], scales: &[f32], out: &mut [MaybeUninit<bf16>]) {
        for ((sum, scale), out) in sums.iter().zip(scales).zip(out) {
            out.write(round(*scale * *sum));
        }
    }

    fn round_biased_into(sums: &[f32], bias: Option<&[f32]>, out: &mut [MaybeUninit<bf16>]) {
        match bias {
            Some(bias) => {
                for ((sum, bias), out) in sums.iter().zip(bias).zip(out) {
                    out.write(round(*sum + *bias));
                }
            }
            None => {
                for (sum, out) in sums.iter().zip(out) {
                    out.write(round(*sum));
                }
            }
        }
    }

    fn add_into(sums: &[f32], bias: Option<&[f32]>, residual: &[f32], out: &mut [MaybeUninit<f32>]) {
        match bias {
            Some(bias) => {
                for (((sum, bias), residual), out) in sums.iter().zip(bias).zip(residual).zip(out) {
                    out.write(*sum + *bias + *residual);
                }
            }
            None => {
                for ((sum, residual), out) in sums.iter().zip(residual).zip(out) {
                    out.write(*sum + *residual);
                }
            }
        }
    }

    fn normalise(
        x: &[f32],
        inverse_rms: f32,
        gain: &[f32],
        scaled: &mut [MaybeUninit<bf16>],
        u: &mut [MaybeUninit<bf16>],
    ) {
        for (((x, gain), scaled), u) in x.iter().zip(gain).zip(scaled).zip(u) {
            let value = round(*x * inverse_rms);
            scaled.write(value);
            u.write(round(widen(value) * *gain));
        }
    }

    fn multiply_into(scaled: &[bf16], gain: &[f32], u: &mut [MaybeUninit<bf16>]) {
        for ((scaled, gain), u) in scaled.iter().zip(gain).zip(u) {
            u.write(round(widen(*scaled) * *gain));
        }
    }

    /// `dx = r (g du - x̂ mean(g du x̂))` with x̂ = x r; `dx` holds du before.
    fn normalise_backward(dx: &mut [f32], scaled: &[bf16], gain: &[f32], inverse_rms: f32) {
        const LANES: usize = 32;
        let mut lanes = [0.0_f32; LANES];
        let chunks = dx.as_chunks::<LANES>().0.iter().zip(scaled.as_chunks::<LANES>().0);
        for ((du, scaled), gain) in chunks.zip(gain.as_chunks::<LANES>().0) {
            for i in 0..LANES {
                lanes[i] += du[i] * gain[i] * widen(scaled[i]);
            }
        }
        let tail = dx.len() / LANES * LANES;
        let mut sum: f32 = lanes.iter().sum();
        for i in tail..dx.len() {
            sum += dx[i] * gain[i] * widen(scaled[i]);
        }
        let mean = sum / dx.len() as f32;
        for ((dx, scaled), gain) in dx.iter_mut().zip(scaled).zip(gain) {
            *dx = inverse_rms * (*dx * *gain - widen(*scaled) * mean);
        }
    }

    fn add_product(du: &[f32], scaled: &[bf16], sums: &mut [f32]) {
        for ((du, scaled), sum) in du.iter().zip(scaled).zip(sums) {
            *sum += *du * widen(*scaled);
        }
    }

    fn activate(gate: &[bf16], up: &[bf16], u: &mut [MaybeUninit<bf16>]) {
        for ((gate, up), u) in gate.iter().zip(up).zip(u) {
            let gate = widen(*gate);
            u.write(round(gate / (1.0 + exp(-gate)) * widen(*up)));
        }
    }

    fn activate_backward(
        du: &[f32],
        gate: &[bf16],
        up: &[bf16],
        d_gate: &mut [MaybeUninit<bf16>],
        d_up: &mut [MaybeUninit<bf16>],
        u: &mut [MaybeUninit<bf16>],
    ) {
        let out = d_gate.iter_mut().zip(d_up).zip(u);
        for (((du, gate), up), ((d_gate, d_up), u)) in du.iter().zip(gate).zip(up).zip(out) {
            let (gate, up) = (widen(*gate), widen(*up));
            let sigmoid = 1.0 / (1.0 + exp(-gate));
            let silu = gate * sigmoid;
            d_up.write(round(*du * silu));
            d_gate.write(round(*du * up * (sigmoid + silu * (1.0 - sigmoid))));
            u.write(round(silu * up));
        }
    }
}

impl<B: ProjectKernels, C: CheckpointStrategy> Project for Autodiff<B, C> {
    fn project(
        x: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        a0: FloatTensor<Self>,
        b0: FloatTensor<Self>,
        a1: FloatTensor<Self>,
        b1: FloatTensor<Self>,
        a2: FloatTensor<Self>,
        b2: FloatTensor<Self>,
        spec: Arc<Spec>,
    ) -> FloatTensor<Self> {
        let (x, x_node) = x.into_parts();
        let (residual, residual_node) = residual.into_parts();
        let gain_node = gain.into_parts().1;
        let parts = [a0, b0, a1, b1, a2, b2].map(FloatTensor::<Self>::into_parts);
        let [p0, p1, p2, p3, p4, p5] = parts;
        let nodes = [x_node, residual_node, gain_node, p0.1, p1.1, p2.1, p3.1, p4.1, p5.1];
        let (y, saved) = B::forward(x, residual, [p0.0, p1.0, p2.0, p3.0, p4.0, p5.0], spec);
        match ProjectBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(saved, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

#[derive(Debug)]
struct ProjectBackward;

impl<B: ProjectKernels> Backward<B, 9> for ProjectBackward {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Self::State, 9>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [x, residual, gain, pairs @ ..] = ops.parents;
        let gradients = B::backward(ops.state, dy.clone(), x.is_some(), gain.is_some());
        if let Some(residual) = residual {
            grads.register::<B>(residual.id, dy);
        }
        if let (Some(x), Some(gradient)) = (x, gradients.x) {
            grads.register::<B>(x.id, gradient);
        }
        if let (Some(gain), Some(gradient)) = (gain, gradients.gain) {
            grads.register::<B>(gain.id, gradient);
        }
        for (node, gradient) in pairs.into_iter().zip(gradients.pairs) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tune_quant::BlockType;

    use super::*;
    use crate::testing::{frozen, random, uniform, values};

    /// What rounding factors to `bf16` may cost: torch's own bf16 autocast differs from its `f32` by about as much.
    const LARGEST: f32 = 2e-2;
    const ROOT_MEAN_SQUARE: f32 = 8e-3;

    fn to_bf16(x: &Tensor<2>) -> Tensor<2> {
        x.clone().cast(DType::BF16)
    }

    fn assert_close(what: &str, got: Tensor<2>, want: Tensor<2>) {
        assert_eq!(got.dims(), want.dims(), "{what}");
        let (got, want) = (values(got), values(want));
        let largest = want.iter().fold(1e-6_f32, |a, b| a.max(b.abs()));
        let mut squares = (0.0, 1e-12);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!((got - want).abs() <= LARGEST * largest, "{what}[{i}]: {got}, want {want} of {largest}");
            squares = (squares.0 + (got - want).powi(2), squares.1 + want.powi(2));
        }
        let relative = (squares.0 / squares.1).sqrt();
        assert!(relative <= ROOT_MEAN_SQUARE, "{what}: relative error {relative}");
    }

    /// Everything that is trained or read, and the same with the roles of a projection.
    struct Case {
        transform: &'static str,
        ranks: Vec<usize>,
        bias: bool,
        residual: bool,
        block_type: BlockType,
        tokens: usize,
        d_in: usize,
        d_out: usize,
        /// Weights, biases and gains, instead of pairs.
        is_trained: bool,
    }

    impl Case {
        fn assert(&self) {
            let width = if self.transform == "swiglu" { 2 * self.d_in } else { self.d_in };
            let mut leaves = vec![random(1, [self.tokens, width])];
            if self.residual {
                leaves.push(random(2, [self.tokens, self.d_out * self.ranks.len()]));
            }
            if self.is_trained && self.transform == "norm" {
                leaves.push(random(4, [1, self.d_in]));
            }
            for i in (0..self.ranks.len() as u64).filter(|_| self.is_trained) {
                leaves.push(random(10 + i, [self.d_out, self.d_in]));
                leaves.extend(self.bias.then(|| random(20 + i, [1, self.d_out])));
            }
            for (i, rank) in self.ranks.iter().enumerate().filter(|_| !self.is_trained) {
                leaves.push(random(10 + i as u64, [*rank, self.d_in]));
                leaves.push(random(20 + i as u64, [self.d_out, *rank]));
            }
            let weighting = random(3, [self.tokens, self.d_out * self.ranks.len()]);
            let gradients = |fast: bool| {
                let tracked: Vec<_> = leaves.iter().map(|x| x.clone().autodiff().require_grad()).collect();
                let y = self.apply(&tracked, fast);
                let y = if fast { y.cast(DType::F32) } else { y };
                let tape = (y.clone() * weighting.clone().autodiff()).sum().backward();
                let of_leaves = tracked.iter().map(|x| x.grad(&tape)).collect::<Vec<_>>();
                (y.inner(), of_leaves)
            };
            let ((got_y, got), (want_y, want)) = (gradients(true), gradients(false));
            assert_close("y", got_y, want_y.clone());
            assert_close("y without a graph", self.apply(&leaves, true).cast(DType::F32), want_y);
            for (i, (got, want)) in got.into_iter().zip(want).enumerate() {
                if leaves[i].dims().contains(&0) {
                    continue;
                }
                let (got, want) = (got.expect("a gradient"), want.expect("a gradient"));
                assert_close(&format!("gradient {i}"), got.cast(DType::F32), want);
            }
        }

        fn apply(&self, leaves: &[Tensor<2>], fast: bool) -> Tensor<2> {
            let mut leaves = leaves.iter().cloned();
            let x = leaves.next().unwrap();
            let residual = self.residual.then(|| leaves.next().unwrap());
            let as_input = |x: Tensor<2>| if fast { to_bf16(&x) } else { x };
            let input = match self.transform {
                "plain" => Input::Plain(as_input(x)),
                "swiglu" => Input::SwiGlu(as_input(x)),
                _ if self.is_trained => {
                    Input::Norm { x, gain: Vector::Trained(leaves.next().unwrap()), eps: 1e-5 }
                }
                _ => Input::Norm { x, gain: uniform(4, self.d_in).into(), eps: 1e-5 },
            };
            let layers: Vec<Layer> = self
                .ranks
                .iter()
                .map(|rank| {
                    if self.is_trained {
                        return Layer {
                            weight: Weight::Trained(leaves.next().unwrap()),
                            bias: self.bias.then(|| Vector::Trained(leaves.next().unwrap())),
                            adapter: None,
                        };
                    }
                    let (a, b) = (leaves.next().unwrap(), leaves.next().unwrap());
                    Layer {
                        weight: frozen(self.block_type, [self.d_out, self.d_in]).into(),
                        bias: self.bias.then(|| uniform(5, self.d_out).into()),
                        adapter: (*rank > 0).then_some((a, b, 0.5)),
                    }
                })
                .collect();
            if fast { project(input, &layers, residual) } else { reference(input, &layers, residual) }
        }
    }

    #[test]
    fn equals_the_reference() {
        for transform in ["plain", "norm", "swiglu"] {
            for (ranks, residual) in
                [(vec![16, 4, 3], false), (vec![8], true), (vec![0, 2], false), (vec![0], true)]
            {
                for (block_type, tokens, d_out, d_in) in [
                    (BlockType::Q4_0, 33, 96, 64),
                    (BlockType::Q8_0, 50, 40, 416),
                    (BlockType::BF16, 7, 31, 54),
                    (BlockType::Q4K, 20, 70, 512),
                ] {
                    let bias = tokens == 7;
                    for is_trained in [false, true] {
                        let ranks = ranks.clone();
                        Case {
                            transform,
                            ranks,
                            bias,
                            residual,
                            block_type,
                            tokens,
                            d_in,
                            d_out,
                            is_trained,
                        }
                        .assert();
                    }
                }
            }
        }
    }

    #[test]
    fn no_tokens_and_one_token() {
        let layers = [Layer { weight: frozen(BlockType::Q8_0, [8, 32]).into(), bias: None, adapter: None }];
        assert_eq!(project(Input::Plain(to_bf16(&random(1, [0, 32]))), &layers, None).dims(), [0, 8]);
        let ranks = vec![4];
        let case = Case {
            transform: "norm",
            ranks,
            bias: true,
            residual: false,
            block_type: BlockType::F32,
            tokens: 1,
            d_in: 64,
            d_out: 32,
            is_trained: false,
        };
        case.assert();
    }

    #[test]
    fn a_plain_input_beside_trained_pairs_is_a_constant() {
        let (a, b) =
            (random(2, [2, 32]).autodiff().require_grad(), random(3, [8, 2]).autodiff().require_grad());
        let layers = [Layer {
            weight: frozen(BlockType::Q8_0, [8, 32]).into(),
            bias: None,
            adapter: Some((a.clone(), b.clone(), 1.0)),
        }];
        let tape = project(Input::Plain(to_bf16(&random(1, [5, 32]))), &layers, None).sum().backward();
        assert!(a.grad(&tape).is_some() && b.grad(&tape).is_some());
    }
}
