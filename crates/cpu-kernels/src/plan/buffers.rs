//! Where a plan's intermediate rows live.
//!
//! Every buffer is rows of a fixed width, one row a token, or one row a logit row. Buffers whose
//! lives do not overlap share a slot, so that a step touches as little memory as it can:
//!
//! ```text
//! op        0    1    2    3    4
//! buffer a  w----r                      slot 0
//! buffer b       w---------r            slot 1
//! buffer c            w---------r       slot 0
//! ```

use crate::bf16;
use crate::rows::{Rows, RowsMut};
use crate::scratch::Scratch;

/// What one row of a buffer stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// A token of the step.
    Token,
    /// A row whose logits are asked for.
    Output,
}

/// The type of a buffer's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    Bf16,
    F32,
}

impl Element {
    fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Some columns of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    pub buffer: usize,
    pub first: usize,
    pub cols: usize,
}

#[derive(Clone, Debug)]
struct Buffer {
    cols: usize,
    element: Element,
    extent: Extent,
    /// The ops that write it first and use it last.
    life: Option<(usize, usize)>,
    slot: usize,
}

/// The bytes of one row, and what a row stands for.
#[derive(Clone, Copy, Debug)]
struct Slot {
    row_bytes: usize,
    extent: Extent,
    free_after: usize,
}

/// A plan's buffers, first described, then placed, then given memory for each step.
#[derive(Default)]
pub struct Buffers {
    buffers: Vec<Buffer>,
    slots: Vec<Slot>,
    memory: Scratch,
    /// Where each slot begins in `memory`, for the step that runs.
    starts: Vec<*mut u8>,
    tokens: usize,
    outputs: usize,
}

// SAFETY: the pointers lead into `memory`, which moves along.
unsafe impl Send for Buffers {}
// SAFETY: through a shared reference they are only followed by unsafe methods.
unsafe impl Sync for Buffers {}

impl Buffers {
    pub fn add(&mut self, cols: usize, element: Element, extent: Extent) -> usize {
        self.buffers.push(Buffer {
            cols,
            element,
            extent,
            life: None,
            slot: 0,
        });
        self.buffers.len() - 1
    }

    /// Note that op number `op` reads or writes `view`.
    ///
    /// # Errors
    /// Where there is no such buffer, column or type.
    pub fn used(&mut self, view: View, element: Element, op: usize) -> Result<Extent, String> {
        let known = self.buffers.len();
        let Some(buffer) = self.buffers.get_mut(view.buffer) else {
            return Err(format!("buffer {} of {known}", view.buffer));
        };
        let end = view.first.checked_add(view.cols);
        if end.is_none_or(|end| end > buffer.cols) || buffer.element != element {
            return Err(format!("{view:?} as {element:?} of {buffer:?}"));
        }
        let (born, _) = buffer.life.unwrap_or((op, op));
        buffer.life = Some((born, op));
        Ok(buffer.extent)
    }

    /// The ops that use a buffer first and last, if any does.
    pub fn life(&self, buffer: usize) -> Option<(usize, usize)> {
        self.buffers[buffer].life
    }

    /// Forget who uses what: operations are about to be noted anew.
    pub fn forget(&mut self) {
        for buffer in &mut self.buffers {
            buffer.life = None;
        }
    }

    /// Give every buffer a slot: the first that is free for the whole of its life.
    pub fn place(&mut self) {
        self.slots.clear();
        for buffer in &mut self.buffers {
            let Some((born, dies)) = buffer.life else {
                continue;
            };
            let row_bytes = buffer.cols * buffer.element.bytes();
            let free = self
                .slots
                .iter()
                .position(|slot| slot.free_after < born && slot.extent == buffer.extent);
            buffer.slot = free.unwrap_or(self.slots.len());
            if let Some(slot) = free.map(|index| &mut self.slots[index]) {
                slot.row_bytes = slot.row_bytes.max(row_bytes);
                slot.free_after = dies;
            } else {
                self.slots.push(Slot {
                    row_bytes,
                    extent: buffer.extent,
                    free_after: dies,
                });
            }
        }
    }

    /// Take memory for a step of `tokens` tokens and `outputs` logit rows.
    pub fn open(&mut self, tokens: usize, outputs: usize) {
        let bytes_of = |slot: &Slot| {
            let rows = match slot.extent {
                Extent::Token => tokens,
                Extent::Output => outputs,
            };
            (slot.row_bytes * rows).next_multiple_of(64)
        };
        let total = self.slots.iter().map(bytes_of).sum();
        let [memory] = self.memory.parts([total]);
        let mut rest = memory;
        self.starts.clear();
        for slot in &self.slots {
            let (part, left) = rest.split_at_mut(bytes_of(slot));
            self.starts.push(part.as_mut_ptr());
            rest = left;
        }
        self.tokens = tokens;
        self.outputs = outputs;
    }

    fn locate(&self, view: View) -> (*mut u8, usize, usize, usize) {
        let buffer = &self.buffers[view.buffer];
        let rows = match buffer.extent {
            Extent::Token => self.tokens,
            Extent::Output => self.outputs,
        };
        let start = self.starts[buffer.slot].wrapping_add(view.first * buffer.element.bytes());
        (start, rows, view.cols, buffer.cols)
    }

    /// # Safety
    /// `view` was accepted by `used` as bf16, and nobody writes it meanwhile.
    pub unsafe fn read<'a>(&self, view: View) -> Rows<'a, bf16> {
        let (start, rows, cols, stride) = self.locate(view);
        // SAFETY: `open` has taken memory for these rows; bf16 is any two bytes.
        unsafe { Rows::from_raw(start.cast(), rows, cols, stride) }
    }

    /// # Safety
    /// As for `read`, as f32.
    pub unsafe fn read_f32<'a>(&self, view: View) -> Rows<'a, f32> {
        let (start, rows, cols, stride) = self.locate(view);
        // SAFETY: as above.
        unsafe { Rows::from_raw(start.cast(), rows, cols, stride) }
    }

    /// # Safety
    /// As for `read`, and nobody reads it meanwhile.
    pub unsafe fn write<'a>(&self, view: View) -> RowsMut<'a, bf16> {
        let (start, rows, cols, stride) = self.locate(view);
        // SAFETY: as above.
        unsafe { RowsMut::from_raw(start.cast(), rows, cols, stride) }
    }

    /// # Safety
    /// As for `write`, as f32.
    pub unsafe fn write_f32<'a>(&self, view: View) -> RowsMut<'a, f32> {
        let (start, rows, cols, stride) = self.locate(view);
        // SAFETY: as above.
        unsafe { RowsMut::from_raw(start.cast(), rows, cols, stride) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_that_live_apart_share_a_slot() {
        let mut buffers = Buffers::default();
        let [a, b, c] = [8, 16, 4].map(|cols| buffers.add(cols, Element::Bf16, Extent::Token));
        let view = |buffer| View {
            buffer,
            first: 0,
            cols: 4,
        };
        for (op, buffer) in [(0, a), (1, a), (1, b), (2, b), (2, c), (3, b), (4, c)] {
            buffers.used(view(buffer), Element::Bf16, op).unwrap();
        }
        buffers.place();
        assert_eq!(buffers.slots.len(), 2);
        buffers.open(3, 0);
        // SAFETY: accepted above, one at a time.
        let (a, c) = unsafe { (buffers.read(view(a)), buffers.read(view(c))) };
        assert_eq!((a.rows(), a.stride(), c.stride()), (3, 8, 4));
    }

    #[test]
    fn views_outside_a_buffer_are_refused() {
        let mut buffers = Buffers::default();
        let buffer = buffers.add(8, Element::Bf16, Extent::Token);
        let wrong = [(buffer, 5, 4), (buffer, usize::MAX, 2), (buffer + 1, 0, 1)];
        for (buffer, first, cols) in wrong {
            let view = View {
                buffer,
                first,
                cols,
            };
            assert!(buffers.used(view, Element::Bf16, 0).is_err());
        }
        let whole = View {
            buffer,
            first: 0,
            cols: 8,
        };
        assert!(buffers.used(whole, Element::F32, 0).is_err());
    }
}
