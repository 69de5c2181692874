//! Two-dimensional views of memory that somebody else owns: rows of a batch's tokens.
//!
//! ```text
//!         |<-- cols -->|
//! row 0   x x x x x x x . . .
//! row 1   x x x x x x x . . .     neighbouring rows begin `stride` elements apart
//! ```

use std::marker::PhantomData;
use std::ops::Range;

/// Rows that are only read.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    start: *const T,
    rows: usize,
    cols: usize,
    stride: usize,
    memory: PhantomData<&'a [T]>,
}

// SAFETY: a shared view of plain numbers, like `&[T]`.
unsafe impl<T: Sync> Send for Rows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Rows<'_, T> {}

impl<'a, T: Copy> Rows<'a, T> {
    /// # Safety
    /// `start` is aligned for `T` and `(rows - 1) * stride + cols` elements from it are initialised,
    /// and not written by others, for `'a`; with no rows nothing is asked of it.
    ///
    /// # Panics
    /// If `stride` is below `cols`.
    #[must_use]
    pub unsafe fn from_raw(start: *const T, rows: usize, cols: usize, stride: usize) -> Self {
        assert!(stride >= cols, "rows of {cols} elements every {stride}");
        Self {
            start,
            rows,
            cols,
            stride,
            memory: PhantomData,
        }
    }

    /// # Panics
    /// If `data` is not whole rows of `cols` elements.
    #[must_use]
    pub fn of(data: &'a [T], cols: usize) -> Self {
        let rows = data.len().checked_div(cols).unwrap_or(0);
        assert_eq!(rows * cols, data.len(), "whole rows");
        Self {
            start: data.as_ptr(),
            rows,
            cols,
            stride: cols,
            memory: PhantomData,
        }
    }

    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    #[must_use]
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If there are no such rows.
    #[must_use]
    pub fn between(&self, rows: Range<usize>) -> Self {
        let inside = rows.start <= rows.end && rows.end <= self.rows;
        assert!(inside, "rows {rows:?} of {}", self.rows);
        Self {
            start: self.start.wrapping_add(rows.start * self.stride),
            rows: rows.len(),
            ..*self
        }
    }

    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn row(&self, index: usize) -> &'a [T] {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        // SAFETY: inside what `from_raw` was promised.
        unsafe { std::slice::from_raw_parts(self.start.add(index * self.stride), self.cols) }
    }
}

/// Rows that several threads write, each its own part.
pub struct RowsMut<'a, T> {
    start: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: writing through a shared view is only possible by unsafe methods, whose callers answer
// for disjoint parts.
unsafe impl<T: Send> Send for RowsMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for RowsMut<'_, T> {}

impl<'a, T: Copy> RowsMut<'a, T> {
    /// # Safety
    /// As for `Rows::from_raw`, and nobody else reads or writes these rows for `'a`.
    ///
    /// # Panics
    /// If `stride` is below `cols`.
    #[must_use]
    pub unsafe fn from_raw(start: *mut T, rows: usize, cols: usize, stride: usize) -> Self {
        assert!(stride >= cols, "rows of {cols} elements every {stride}");
        Self {
            start,
            rows,
            cols,
            stride,
            memory: PhantomData,
        }
    }

    /// # Panics
    /// If `data` is not whole rows of `cols` elements.
    #[must_use]
    pub fn of(data: &'a mut [T], cols: usize) -> Self {
        let rows = data.len().checked_div(cols).unwrap_or(0);
        assert_eq!(rows * cols, data.len(), "whole rows");
        Self {
            start: data.as_mut_ptr(),
            rows,
            cols,
            stride: cols,
            memory: PhantomData,
        }
    }

    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    #[must_use]
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The same rows, no longer to be written.
    #[must_use]
    pub fn read(self) -> Rows<'a, T> {
        Rows {
            start: self.start,
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
            memory: PhantomData,
        }
    }

    /// Some of the rows.
    ///
    /// # Safety
    /// No element is written through two views at the same time.
    ///
    /// # Panics
    /// If there are no such rows.
    #[must_use]
    pub unsafe fn between(&self, rows: Range<usize>) -> Self {
        let inside = rows.start <= rows.end && rows.end <= self.rows;
        assert!(inside, "rows {rows:?} of {}", self.rows);
        Self {
            start: self.start.wrapping_add(rows.start * self.stride),
            rows: rows.len(),
            ..*self
        }
    }

    /// Columns `first .. first + count` of a row.
    ///
    /// # Safety
    /// No two living slices share an element.
    ///
    /// # Panics
    /// If there is no such row or column.
    pub unsafe fn part(&self, row: usize, first: usize, count: usize) -> &'a mut [T] {
        assert!(row < self.rows && first + count <= self.cols, "inside");
        // SAFETY: inside what `from_raw` was promised; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride + first), count) }
    }
}
