//! One source compiled for every level.
//!
//! Rust's float arithmetic is exact IEEE whatever the instructions (`mul_add` is fused everywhere),
//! so what is written once gives the same bits at every level, and is as wide as the level allows.

/// Call an `#[inline(always)]` function compiled for a level.
macro_rules! compiled_for {
    ($level:expr, $function:ident($($name:ident: $type:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        fn avx2($($name: $type),*) {
            $function($($name),*)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
        fn avx512($($name: $type),*) {
            $function($($name),*)
        }
        match $level {
            // SAFETY: `Cpu` only has levels that `Level::detect` found.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512($($name),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2($($name),*) },
            _ => $function($($name),*),
        }
    }};
}

pub(super) use compiled_for;
