//! Joins neighbouring operations of which one kernel does both.
//!
//! ```text
//! norm -> linear     linear, which normalises each row as it quantises it
//! linear -> add      linear, whose epilogue adds the residual
//! ```
//!
//! What passed between the two is then written nowhere: it must be of use to nobody else. The bits
//! of what comes out stay those of the two.

use super::buffers::{Buffers, View};
use super::op::Op;

/// `ops`, of which `buffers` knows who uses what, joined where that is possible.
pub(super) fn fuse(ops: Vec<Op>, buffers: &Buffers) -> Vec<Op> {
    let mut fused: Vec<Op> = Vec::with_capacity(ops.len());
    for (index, op) in ops.into_iter().enumerate() {
        // The last operation so far is, or ends with, the one before this.
        let passes = |view: View| Some((index - 1, index)) == buffers.life(view.buffer);
        let joined = fused.last().and_then(|before| join(before, &op, passes));
        match (joined, fused.last_mut()) {
            (Some(joined), Some(last)) => *last = joined,
            _ => fused.push(op),
        }
    }
    fused
}

/// One operation for two, of which the second follows the first; `passes`: whether a view is of the
/// first's making and of no use after the second.
fn join(first: &Op, second: &Op, passes: impl Fn(View) -> bool) -> Option<Op> {
    match (first, second) {
        (
            Op::RmsNorm {
                x,
                norm,
                out: normed,
            },
            Op::Linear {
                x: read,
                norm: None,
                linear,
                residual,
                out,
            },
            // A row of several groups along k would be normalised once for each.
        ) if normed == read && passes(*read) && linear.layout.k_groups() == 1 => Some(Op::Linear {
            x: *x,
            norm: Some(*norm),
            linear: *linear,
            residual: *residual,
            out: *out,
        }),
        (
            Op::Linear {
                x,
                norm,
                linear,
                residual: None,
                out: product,
            },
            Op::Add { a, b, out },
        ) if !linear.layout.gated() && passes(*product) => Some(Op::Linear {
            x: *x,
            norm: *norm,
            linear: *linear,
            residual: Some(other(*product, *a, *b)?),
            out: *out,
        }),
        (
            Op::Reduced {
                x,
                linear,
                residual: None,
                out: product,
            },
            Op::Add { a, b, out },
        ) if passes(*product) => Some(Op::Reduced {
            x: *x,
            linear: *linear,
            residual: Some(other(*product, *a, *b)?),
            out: *out,
        }),
        _ => None,
    }
}

/// What `product` is added to in `a + b`; none if that is not another buffer.
fn other(product: View, a: View, b: View) -> Option<View> {
    let other = match (a == product, b == product) {
        (true, false) => b,
        (false, true) => a,
        _ => return None,
    };
    (other.buffer != product.buffer).then_some(other)
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::super::*;
    use crate::level::Level;
    use crate::linear::{Format, Layout, pack};
    use crate::rows::Rows;

    // No whole panels, and norms that end within a cache line.
    const HIDDEN: usize = 72;
    const INNER: usize = 160;
    const WORDS: usize = 40;
    const INT4: Format = Format::Int4 {
        group: 32,
        zeros: false,
    };

    struct Model {
        table: Vec<bf16>,
        norm: Vec<bf16>,
        bias: Vec<bf16>,
        up: Packed,
        down: Packed,
        head: Packed,
    }

    /// A packed weight, at an address that is a multiple of 64.
    struct Packed {
        layout: Layout,
        bytes: Vec<u8>,
        first: usize,
    }

    impl Packed {
        fn linear(&self, bias: Option<*const bf16>) -> Linear {
            Linear {
                layout: self.layout,
                weight: self.bytes[self.first..].as_ptr(),
                bias,
            }
        }
    }

    fn numbers(random: &mut StdRng, count: usize) -> Vec<bf16> {
        let number = |_| bf16::from_f32(random.random_range(-2.0..2.0));
        (0..count).map(number).collect()
    }

    fn packed(random: &mut StdRng, cpu: &Cpu, layout: Layout) -> Packed {
        let k = layout.k();
        let weight = numbers(random, layout.n() * k);
        let mut bytes = vec![0; layout.bytes() + 64];
        let first = bytes.as_ptr().align_offset(64);
        let room = &mut bytes[first..first + layout.bytes()];
        pack(cpu, &layout, Rows::of(&weight, k), room);
        Packed {
            layout,
            bytes,
            first,
        }
    }

    /// Two layers of norm, up, down and a residual; `keep`: with one more reader of everything that
    /// could be joined away.
    fn record(model: &Model, keep: bool) -> Plan {
        let mut plan = Plan {
            // There is no attention; one block that is large enough for any batch.
            blocks: Some((1 << 20, 1)),
            ..Plan::default()
        };
        let rows = |plan: &mut Plan, cols| View {
            buffer: plan.buffer(cols, Element::Bf16, Extent::Token),
            first: 0,
            cols,
        };
        let mut ops = Vec::new();
        let mut x = rows(&mut plan, HIDDEN);
        let table = Table {
            start: model.table.as_ptr(),
            rows: WORDS,
            cols: HIDDEN,
            stride: HIDDEN,
        };
        ops.push(Op::Embed { table, out: x });
        let mut passed = Vec::new();
        for layer in 0..2 {
            let [normed, product, sum] = [(); 3].map(|()| rows(&mut plan, HIDDEN));
            let middle = rows(&mut plan, INNER);
            let norm = Norm {
                weight: model.norm.as_ptr(),
                eps: 1e-6,
            };
            ops.push(Op::RmsNorm {
                x,
                norm,
                out: normed,
            });
            ops.push(Op::Linear {
                x: normed,
                norm: None,
                linear: model.up.linear(None),
                residual: None,
                out: middle,
            });
            ops.push(Op::Linear {
                x: middle,
                norm: None,
                linear: model.down.linear(Some(model.bias.as_ptr())),
                residual: None,
                out: product,
            });
            let (a, b) = if layer == 0 {
                (x, product)
            } else {
                (product, x)
            };
            ops.push(Op::Add { a, b, out: sum });
            passed.extend([normed, product]);
            x = sum;
        }
        if keep {
            for view in passed {
                let out = rows(&mut plan, HIDDEN);
                ops.push(Op::Add {
                    a: view,
                    b: view,
                    out,
                });
            }
        }
        let chosen = View {
            buffer: plan.buffer(HIDDEN, Element::Bf16, Extent::Output),
            ..x
        };
        ops.push(Op::Pick { x, out: chosen });
        ops.push(Op::Logits {
            x: chosen,
            linear: model.head.linear(None),
            first: 0,
        });
        for op in ops {
            // SAFETY: the model outlives the plan, and there is no cache.
            unsafe { plan.push(op) }.unwrap();
        }
        plan.finish().unwrap();
        plan
    }

    fn logits(plan: &mut Plan, cpu: &mut Cpu, ids: &[i64]) -> Vec<f32> {
        let positions: Vec<i64> = (0..).zip(ids).map(|(position, _)| position).collect();
        let spans = [Span {
            first_row: 0,
            start: 0,
            count: ids.len(),
            table_first: 0,
        }];
        let step = Step {
            token_ids: ids,
            positions: &positions,
            logit_rows: &positions,
            spans: &spans,
            tables: &[0],
        };
        let mut logits = vec![0.0; ids.len() * WORDS];
        let wanted = Wanted::Logits(RowsMut::of(&mut logits, WORDS));
        plan.run(cpu, &step, wanted).unwrap();
        logits
    }

    #[test]
    fn nothing_is_appended_to_a_plan_that_is_finished() {
        let mut plan = Plan::default();
        plan.finish().unwrap();
        let view = View {
            buffer: plan.buffer(4, Element::Bf16, Extent::Token),
            first: 0,
            cols: 4,
        };
        let op = Op::Add {
            a: view,
            b: view,
            out: view,
        };
        // SAFETY: it points to nothing.
        let refused = unsafe { plan.push(op) };
        assert!(matches!(refused, Err(PlanError::Finished)));
    }

    #[test]
    fn what_is_joined_gives_the_bits_of_what_is_not_at_every_level_and_format() {
        let mut random = StdRng::seed_from_u64(3);
        for level in Level::available() {
            for format in [Format::Int8, INT4, Format::Bf16] {
                let mut cpu = Cpu::at_level(level, 2, 0).unwrap();
                let layout =
                    |n, k, groups, gated| Layout::new(format, n, k, groups, gated).unwrap();
                let model = Model {
                    table: numbers(&mut random, WORDS * HIDDEN),
                    norm: numbers(&mut random, HIDDEN),
                    bias: numbers(&mut random, HIDDEN),
                    up: packed(&mut random, &cpu, layout(2 * INNER, HIDDEN, 1, true)),
                    down: packed(&mut random, &cpu, layout(HIDDEN, INNER, 2, false)),
                    head: packed(&mut random, &cpu, layout(WORDS, HIDDEN, 1, false)),
                };
                let (mut joined, mut kept) = (record(&model, false), record(&model, true));
                assert_eq!(
                    (joined.ops().len(), kept.ops().len()),
                    (3 + 2 * 2, 3 + 2 * 4 + 4)
                );
                for count in [1, 3, 70, 300] {
                    let ids: Vec<i64> = (0..count).map(|_| random.random_range(0..40)).collect();
                    let found = logits(&mut joined, &mut cpu, &ids);
                    assert!(found.iter().all(|x| x.is_finite()));
                    assert_eq!(found, logits(&mut kept, &mut cpu, &ids));
                }
            }
        }
    }
}
