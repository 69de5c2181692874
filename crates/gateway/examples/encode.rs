//! How long a long prompt takes to become ids: by the tokenizers library at once, in pieces, and seen before.
//!
//! `cargo run --release -p scalellm-gateway --example encode FOLDER TEXT_FILE [ROUNDS]`; the first 220 KB of the text.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use scalellm_gateway::text::TextModel;
use tokenizers::Tokenizer;

const TEXT_BYTES: usize = 220_000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (folder, file) = (
        arguments.next().ok_or("a model's folder is missing")?,
        arguments.next().ok_or("a file of text is missing")?,
    );
    let rounds: u32 = arguments.next().map_or(Ok(5), |rounds| rounds.parse())?;
    let folder = Path::new(&folder);
    let content = std::fs::read_to_string(file)?;
    let starts = content.char_indices().map(|(start, _)| start);
    let end = starts.take_while(|start| *start <= TEXT_BYTES).last();
    let text = &content[..end.unwrap_or(0)];
    println!(
        "{} bytes; ms: library, in pieces, seen before, all but the end seen before",
        text.len()
    );
    for round in 0..rounds {
        // Each of the two begins without words that it knows.
        let library =
            Tokenizer::from_file(folder.join("tokenizer.json")).map_err(|e| e.to_string())?;
        let model = TextModel::load(folder)?;
        let started = Instant::now();
        let whole = library
            .encode_fast(text, false)
            .map_err(|e| e.to_string())?;
        print!("{:8.2}", ms(started));
        let longer = format!("{text} And so it ends, round {round}.");
        for text in [text, text, &longer] {
            let started = Instant::now();
            let ids = model.encode(text, false)?;
            print!("{:8.2}", ms(started));
            assert_eq!(ids[..whole.len() / 2], whole.get_ids()[..whole.len() / 2]);
        }
        println!();
    }
    Ok(())
}

fn ms(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e3
}
