//! `_core.Ranks`: the processes that compute a replica's steps together, as one of them sees them;
//! and the operations in which they meet, for steps that run eagerly.

use std::net::TcpStream;
use std::num::NonZeroU32;
use std::os::fd::{BorrowedFd, FromRawFd, RawFd};
use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::exceptions::{PyConnectionAbortedError, PyOSError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use scalellm_cpu_kernels::bf16;
use scalellm_cpu_kernels::linear::{self, Output, Packed};
use scalellm_cpu_kernels::ranks::{self, Link, Links, MOST, RankLost, Region, Sizes};
use scalellm_cpu_kernels::rows::{Rows, RowsMut};

use crate::kernels::{RowsAt, SliceAt, on_cpu, refused, slice};
use crate::matrices::layout;

/// Add the class and functions of this file to `module`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("MOST_RANKS", MOST)?;
    module.add_class::<PyRanks>()?;
    module.add_function(wrap_pyfunction!(cpu_linear_reduced, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_logits_among, module)?)
}

/// The others' end as Python's exception.
pub fn lost(error: RankLost) -> PyErr {
    PyConnectionAbortedError::new_err(error.to_string())
}

/// One rank of a replica, over a file of `bytes_for` zeros that all ranks map.
#[pyclass(name = "Ranks", module = "scalellm._core", frozen)]
pub struct PyRanks {
    region: Arc<Region>,
    links: Option<Arc<Links>>,
    pub ranks: Arc<Mutex<ranks::Ranks>>,
}

#[pymethods]
impl PyRanks {
    /// `link_mb_s`: as if over a link of so many MB/s; 0 is the shared memory's own speed. `links`:
    /// descriptors of connections to all ranks, -1 for this one, which it takes over; the file is
    /// this rank's alone then.
    #[new]
    #[pyo3(signature = (file, rank, count, letter_bytes, slot_bytes, link_mb_s = 0, links = None))]
    fn new(
        file: RawFd,
        rank: usize,
        count: usize,
        letter_bytes: usize,
        slot_bytes: usize,
        link_mb_s: u32,
        links: Option<Vec<RawFd>>,
    ) -> PyResult<Self> {
        // SAFETY: the caller gives them up.
        let links = links.map(|links| unsafe { linked(&links) }).transpose()?;
        if rank >= count || count > MOST || file < 0 {
            return Err(refused(format!("rank {rank} of {count}, file {file}")));
        }
        let sizes = Sizes {
            ranks: count,
            letter_bytes,
            slot_bytes,
        };
        // SAFETY: the caller's descriptor is open during this call.
        let file = unsafe { BorrowedFd::borrow_raw(file) };
        let region =
            Region::map(file, sizes).map_err(|error| PyOSError::new_err(error.to_string()))?;
        let region = Arc::new(region);
        let mut ranks = match &links {
            None => ranks::Ranks::new(Arc::clone(&region), rank),
            Some(links) => ranks::Ranks::linked(Arc::clone(&region), rank, Arc::clone(links)),
        };
        if let Some(megabytes_s) = NonZeroU32::new(link_mb_s) {
            ranks = ranks.over(Link { megabytes_s });
        }
        Ok(Self {
            region,
            links,
            ranks: Arc::new(Mutex::new(ranks)),
        })
    }

    /// Bytes of the file that ranks share.
    #[staticmethod]
    fn bytes_for(count: usize, letter_bytes: usize, slot_bytes: usize) -> usize {
        let sizes = Sizes {
            ranks: count,
            letter_bytes,
            slot_bytes,
        };
        sizes.bytes()
    }

    /// What the operations of eager steps take; it means nothing without this object.
    #[getter]
    fn address(&self) -> usize {
        Arc::as_ptr(&self.ranks).expose_provenance()
    }

    /// Give every other rank a letter; of rank 0 alone.
    fn send(&self, py: Python<'_>, letter: &[u8]) -> PyResult<()> {
        py.detach(|| self.ranks.lock().send(letter)).map_err(lost)
    }

    /// Wait for rank 0's next letter.
    fn receive<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let letter = py.detach(|| self.ranks.lock().receive()).map_err(lost)?;
        Ok(PyBytes::new(py, &letter))
    }

    /// Bring this rank's columns `bounds[rank] ..` of f32 [rows, last of `bounds`] at `out` to the
    /// others, and theirs here; of ranks that have no memory in common.
    fn gather(&self, py: Python<'_>, rows: usize, bounds: Vec<usize>, out: usize) -> PyResult<()> {
        let (cols, count) = (bounds.last().copied(), self.region.sizes().ranks);
        let Some(cols) = cols.filter(|_| bounds.len() == count + 1 && bounds.is_sorted()) else {
            return Err(refused(format!("{bounds:?} for {count} ranks")));
        };
        py.detach(|| {
            // SAFETY: the caller's tensor has this size, and is nobody else's meanwhile.
            let out = unsafe { RowsMut::from_raw(out as *mut f32, rows, cols, cols) };
            gather(&mut self.ranks.lock(), &bounds, &out)
        })
        .map_err(lost)
    }

    /// A rank has ended, or failed: nobody waits for it any more, in any process.
    fn give_up(&self) {
        self.region.give_up();
        if let Some(links) = &self.links {
            links.shut();
        }
    }
}

/// # Safety
/// The descriptors are open and nobody else's, but for negative ones.
unsafe fn linked(links: &[RawFd]) -> PyResult<Arc<Links>> {
    let stream = |&file: &RawFd| {
        // SAFETY: by the caller's promise.
        (file >= 0).then(|| unsafe { TcpStream::from_raw_fd(file) })
    };
    let links = Links::new(links.iter().map(stream).collect());
    links
        .map(Arc::new)
        .map_err(|error| PyOSError::new_err(error.to_string()))
}

/// All columns of `out`, of which each rank has written its own.
fn gather(ranks: &mut ranks::Ranks, bounds: &[usize], out: &RowsMut<f32>) -> Result<(), RankLost> {
    let widths: Vec<_> = bounds.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let widest = widths.iter().copied().max().unwrap_or_default();
    let (own, rows) = (ranks.rank(), out.rows());
    let mine = ranks.mine::<f32>(rows, widest);
    for row in 0..rows {
        // SAFETY: the only slices of both.
        let (to, from) = unsafe {
            (
                mine.part(row, 0, widths[own]),
                out.part(row, bounds[own], widths[own]),
            )
        };
        to.copy_from_slice(from);
    }
    ranks.meet()?;
    for (rank, part) in ranks.parts::<f32>(rows, widest).into_iter().enumerate() {
        for row in 0..rows {
            // SAFETY: the only slice of it.
            let to = unsafe { out.part(row, bounds[rank], widths[rank]) };
            to.copy_from_slice(&part.row(row)[..widths[rank]]);
        }
    }
    Ok(())
}

/// The ranks that `PyRanks::address` names.
///
/// # Safety
/// The object lives for `'a`.
pub unsafe fn ranks_at<'a>(address: usize) -> &'a Mutex<ranks::Ranks> {
    // SAFETY: by the caller's promise.
    unsafe { &*std::ptr::with_exposed_provenance(address) }
}

/// y = x W^T + b in bf16, of which each rank has some of the weight's groups; `out` is contiguous.
#[pyfunction]
fn cpu_linear_reduced(
    py: Python<'_>,
    code: Vec<usize>,
    x: RowsAt,
    weight: SliceAt,
    bias: usize,
    ranks: usize,
    out: usize,
) -> PyResult<()> {
    let layout = layout(&code)?;
    let (rows, n) = (x.1, layout.n());
    if x.2 < layout.k() || layout.gated() || ranks == 0 {
        return Err(refused(format!("rows of {} for {layout:?}", x.2)));
    }
    on_cpu(py, |cpu| {
        // SAFETY: the caller's tensors have these sizes, and its ranks live.
        unsafe {
            let packed = Packed::new(layout, slice(weight)).map_err(refused)?;
            let x = Rows::from_raw(x.0 as *const bf16, rows, layout.k(), x.2);
            let bias = (bias != 0).then(|| slice::<bf16>((bias, n)));
            let out = RowsMut::from_raw(out as *mut bf16, rows, n, n);
            let mut ranks = ranks_at(ranks).lock();
            let out = Output::Bf16(out);
            linear::reduced(cpu, &mut ranks, x, &packed, bias, out).map_err(lost)
        }
    })?
}

/// Logits in f32, [x's rows, last of `bounds`]; rank r has the ids `bounds[r] .. bounds[r + 1]`.
#[pyfunction]
fn cpu_logits_among(
    py: Python<'_>,
    code: Vec<usize>,
    x: RowsAt,
    weight: SliceAt,
    bounds: Vec<usize>,
    ranks: usize,
    out: usize,
) -> PyResult<()> {
    let layout = layout(&code)?;
    if x.2 < layout.k() || layout.gated() || ranks == 0 {
        return Err(refused(format!("rows of {} for {layout:?}", x.2)));
    }
    on_cpu(py, |cpu| {
        // SAFETY: the caller's tensors have these sizes, and its ranks live.
        unsafe {
            let mut ranks = ranks_at(ranks).lock();
            let widths: Vec<_> = bounds.windows(2).map(|pair| pair[1] - pair[0]).collect();
            if widths.len() != ranks.count() || widths[ranks.rank()] != layout.n() {
                return Err(refused(format!("{bounds:?} for {layout:?}")));
            }
            let packed = Packed::new(layout, slice(weight)).map_err(refused)?;
            let (rows, n) = (x.1, layout.n());
            let x = Rows::from_raw(x.0 as *const bf16, rows, layout.k(), x.2);
            let all = bounds[widths.len()];
            let first = (out as *mut f32).wrapping_add(bounds[ranks.rank()]);
            let to = Output::F32(RowsMut::from_raw(first, rows, n, all));
            linear::linear(cpu, x, &packed, None, to);
            let out = RowsMut::from_raw(out as *mut f32, rows, all, all);
            gather(&mut ranks, &bounds, &out).map_err(lost)
        }
    })?
}
