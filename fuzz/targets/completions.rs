#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| scalellm_gateway::fuzzing::completions(data));
