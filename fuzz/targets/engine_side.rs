#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| scalellm_engine_link::fuzzing::engine_side(data));
