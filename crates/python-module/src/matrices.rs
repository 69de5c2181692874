//! `_core.cpu_matrix_*` and `cpu_linear`: weights packed for crates/cpu-kernels, and products with them.

use pyo3::prelude::*;
use scalellm_cpu_kernels::bf16;
use scalellm_cpu_kernels::linear::{self, Format, Layout, Output, Packed};
use scalellm_cpu_kernels::rows::{Rows, RowsMut};

use crate::kernels::{RowsAt, SliceAt, on_cpu, refused, slice};

/// Add the functions of this file to `module`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("CPU_MATRIX_VERSION", linear::VERSION)?;
    module.add_function(wrap_pyfunction!(cpu_matrix_bytes, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_matrix_pack, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_matrix_pack_int4, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_matrix_select, module)?)?;
    module.add_function(wrap_pyfunction!(cpu_linear, module)?)
}

pub fn layout(code: &[usize]) -> PyResult<Layout> {
    let &[format, scale_group, n, k, groups, gated] = code else {
        return Err(refused("a matrix layout is six numbers"));
    };
    let format = match format {
        0 => Format::Bf16,
        1 => Format::Int8,
        2 | 3 => Format::Int4 {
            group: scale_group,
            zeros: format == 3,
        },
        _ => return Err(refused(format!("matrix format {format}"))),
    };
    Layout::new(format, n, k, groups, gated != 0).map_err(refused)
}

#[pyfunction]
fn cpu_matrix_bytes(code: Vec<usize>) -> PyResult<usize> {
    Ok(layout(&code)?.bytes())
}

/// Pack a contiguous bf16 matrix [n, k] at `weight` into the `size` bytes at `out`.
#[pyfunction]
fn cpu_matrix_pack(
    py: Python<'_>,
    code: Vec<usize>,
    weight: usize,
    out: usize,
    size: usize,
) -> PyResult<()> {
    let layout = layout(&code)?;
    let has_zeros = matches!(layout.format(), Format::Int4 { zeros: true, .. });
    if size != layout.bytes() || !out.is_multiple_of(64) || has_zeros {
        return Err(refused(format!("{size} bytes at {out:#x} for {layout:?}")));
    }
    on_cpu(py, |cpu| {
        // SAFETY: the caller's tensor has n * k numbers.
        let weight =
            unsafe { Rows::from_raw(weight as *const bf16, layout.n(), layout.k(), layout.k()) };
        // SAFETY: the caller's tensor has `size` bytes, nobody else's.
        let out = unsafe { std::slice::from_raw_parts_mut(out as *mut u8, size) };
        linear::pack(cpu, &layout, weight, out);
    })
}

/// Pack contiguous int4 numbers u8 [n, k], and f32 scales and u8 zeros [n, `parts`], into the `size`
/// bytes at `out`.
#[pyfunction]
fn cpu_matrix_pack_int4(
    py: Python<'_>,
    code: Vec<usize>,
    weight: (usize, usize, usize),
    parts: usize,
    out: SliceAt,
) -> PyResult<()> {
    let layout = layout(&code)?;
    let has_zeros = matches!(layout.format(), Format::Int4 { zeros: true, .. });
    let fits = out.1 == layout.bytes() && parts == layout.scale_groups();
    if !has_zeros || !fits || !out.0.is_multiple_of(64) {
        return Err(refused(format!(
            "{} bytes at {:#x} and {parts} scale groups for {layout:?}",
            out.1, out.0
        )));
    }
    on_cpu(py, |cpu| {
        let (n, k) = (layout.n(), layout.k());
        let (numbers, scales, zeros) = weight;
        // SAFETY: the caller's tensors have these sizes, and `out` is nobody else's.
        unsafe {
            let weight = linear::Int4 {
                numbers: Rows::from_raw(numbers as *const u8, n, k, k),
                scales: Rows::from_raw(scales as *const f32, n, parts, parts),
                zeros: Rows::from_raw(zeros as *const u8, n, parts, parts),
            };
            let out = std::slice::from_raw_parts_mut(out.0 as *mut u8, out.1);
            linear::pack_int4(cpu, &layout, &weight, out);
        }
    })
}

/// Copy the rows of `ranges` (first, end) of a packed matrix to `out`, which their layout fills.
#[pyfunction]
fn cpu_matrix_select(
    py: Python<'_>,
    code: Vec<usize>,
    weight: SliceAt,
    ranges: Vec<(usize, usize)>,
    out: SliceAt,
) -> PyResult<()> {
    let layout = layout(&code)?;
    let ranges: Vec<_> = ranges.into_iter().map(|(first, end)| first..end).collect();
    let to = linear::selected(&layout, &ranges).map_err(refused)?;
    if out.1 != to.bytes() || !out.0.is_multiple_of(64) {
        return Err(refused(format!(
            "{} bytes at {:#x} for {to:?}",
            out.1, out.0
        )));
    }
    on_cpu(py, |cpu| {
        // SAFETY: the caller's tensors have these sizes, and `out` is nobody else's.
        let (weight, out) = unsafe {
            let out = std::slice::from_raw_parts_mut(out.0 as *mut u8, out.1);
            (slice(weight), out)
        };
        let packed = Packed::new(layout, weight).map_err(refused)?;
        linear::select(cpu, &packed, &ranges, out).map_err(refused)
    })?
}

/// y = x W^T + b. `mode` 0: bf16, 1: silu(gate) * up in bf16, 2: f32; `out` is contiguous.
#[pyfunction]
fn cpu_linear(
    py: Python<'_>,
    code: Vec<usize>,
    mode: u8,
    x: RowsAt,
    weight: SliceAt,
    bias: usize,
    out: usize,
) -> PyResult<()> {
    let layout = layout(&code)?;
    let (rows, columns) = (x.1, layout.columns());
    if x.2 < layout.k() {
        return Err(refused(format!("rows of {} for k = {}", x.2, layout.k())));
    }
    if layout.gated() != (mode == 1) {
        return Err(refused(
            "gated weights are for silu(gate) * up, and others are not",
        ));
    }
    on_cpu(py, |cpu| {
        // SAFETY: the caller's tensors have these sizes.
        let bytes = unsafe { std::slice::from_raw_parts(weight.0 as *const u8, weight.1) };
        let packed = Packed::new(layout, bytes).map_err(refused)?;
        // SAFETY: as above.
        let x = unsafe { Rows::from_raw(x.0 as *const bf16, rows, layout.k(), x.2) };
        // SAFETY: as above.
        let bias = (bias != 0)
            .then(|| unsafe { std::slice::from_raw_parts(bias as *const bf16, layout.n()) });
        // SAFETY: as above, and `out` is nobody else's.
        let out = unsafe {
            match mode {
                0 => Output::Bf16(RowsMut::from_raw(out as *mut bf16, rows, columns, columns)),
                1 => Output::SiluMul(RowsMut::from_raw(out as *mut bf16, rows, columns, columns)),
                2 => Output::F32(RowsMut::from_raw(out as *mut f32, rows, columns, columns)),
                _ => return Err(refused(format!("mode {mode}"))),
            }
        };
        linear::linear(cpu, x, &packed, bias, out);
        Ok(())
    })?
}
