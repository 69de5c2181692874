//! The tokenizer's files in a Hugging Face model folder.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use super::error::TextError;

/// Files that only a slow tokenizer can read.
const SLOW_FILES: [&str; 5] = [
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "vocab.txt",
    "tiktoken.model",
];

/// Names of the special tokens that a template may use.
const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// A model folder, with its tokenizer_config.json read.
pub(super) struct Folder {
    path: PathBuf,
    tokenizer_config: Map<String, Value>,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self, TextError> {
        if !path.is_dir() {
            let what = "no such folder; the model's tokenizer is read from it".to_owned();
            return Err(TextError::Missing {
                path: path.to_owned(),
                what,
            });
        }
        let tokenizer_config =
            read_object(&path.join("tokenizer_config.json"))?.unwrap_or_default();
        Ok(Self {
            path: path.to_owned(),
            tokenizer_config,
        })
    }

    /// The tokenizer, and the digest of its file.
    pub(super) fn tokenizer(&self) -> Result<(Tokenizer, String), TextError> {
        let (path, bytes) = tokenizer_json(&self.path)?;
        let tokenizer = Tokenizer::from_bytes(&bytes).map_err(|e| TextError::Damaged {
            path,
            reason: e.to_string(),
        })?;
        Ok((tokenizer, hex_digest(&bytes)))
    }

    /// Ids that end a sequence: generation_config.json's, else config.json's, else the eos_token's.
    pub(super) fn eos_token_ids(
        &self,
        id_of: impl Fn(&str) -> Option<u32>,
    ) -> Result<Vec<u32>, TextError> {
        for name in ["generation_config.json", "config.json"] {
            let path = self.path.join(name);
            let config = read_object(&path)?.unwrap_or_default();
            let text_config = config
                .get("text_config")
                .and_then(|text| text.get("eos_token_id"));
            let Some(value) = config
                .get("eos_token_id")
                .or(text_config)
                .filter(|value| !value.is_null())
            else {
                continue;
            };
            let ids: Option<Vec<u32>> = match value {
                Value::Array(ids) => ids.iter().map(token_id).collect(),
                one => token_id(one).map(|id| vec![id]),
            };
            return ids.ok_or_else(|| TextError::Damaged {
                path,
                reason: format!("eos_token_id is {value}, expected a token id or a list of them"),
            });
        }
        let special = self.special_tokens()?;
        let id = special
            .get("eos_token")
            .and_then(Value::as_str)
            .and_then(id_of);
        Ok(id.into_iter().collect())
    }

    /// Special tokens by name, as template variables.
    pub(super) fn special_tokens(&self) -> Result<Map<String, Value>, TextError> {
        let legacy = read_object(&self.path.join("special_tokens_map.json"))?.unwrap_or_default();
        let mut tokens = Map::new();
        for name in SPECIAL_TOKENS {
            for source in [&self.tokenizer_config, &legacy] {
                if let Some(content) = source.get(name).and_then(token_content) {
                    tokens.insert(name.to_owned(), content.into());
                    break;
                }
            }
        }
        if let Some(Value::Object(extra)) = self.tokenizer_config.get("extra_special_tokens") {
            for (name, token) in extra {
                if let Some(content) = token_content(token) {
                    tokens.insert(name.clone(), content.into());
                }
            }
        }
        Ok(tokens)
    }

    /// Chat templates as (name, source): files of their own go before tokenizer_config.json's.
    pub(super) fn chat_templates(&self) -> Result<Vec<(String, String)>, TextError> {
        let mut templates = Vec::new();
        if let Some(source) = read_text(&self.path.join("chat_template.jinja"))? {
            templates.push(("default".to_owned(), source));
        }
        let additional = self.path.join("additional_chat_templates");
        for path in sorted_files(&additional, "jinja")? {
            if let (Some(name), Some(source)) =
                (path.file_stem().and_then(|s| s.to_str()), read_text(&path)?)
            {
                templates.push((name.to_owned(), source));
            }
        }
        if !templates.is_empty() {
            return Ok(templates);
        }
        let path = self.path.join("tokenizer_config.json");
        let damaged = |reason: &str| TextError::Damaged {
            path: path.clone(),
            reason: reason.to_owned(),
        };
        match self.tokenizer_config.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(source)) => templates.push(("default".to_owned(), source.clone())),
            Some(Value::Array(list)) => {
                for entry in list {
                    let text =
                        |key: &str| entry.get(key).and_then(Value::as_str).map(str::to_owned);
                    let (Some(name), Some(source)) = (text("name"), text("template")) else {
                        return Err(damaged(
                            "a chat_template in a list needs a name and a template",
                        ));
                    };
                    templates.push((name, source));
                }
            }
            Some(_) => {
                return Err(damaged(
                    "chat_template is neither a string nor a list of named templates",
                ));
            }
        }
        if templates.is_empty() {
            let legacy = read_object(&self.path.join("chat_template.json"))?.unwrap_or_default();
            if let Some(source) = legacy.get("chat_template").and_then(Value::as_str) {
                templates.push(("default".to_owned(), source.to_owned()));
            }
        }
        Ok(templates)
    }
}

/// Hex SHA-256 over the file of `folder` that decides the ids, `tokenizer.json`, without loading it.
pub fn tokenizer_digest(folder: &Path) -> Result<String, TextError> {
    let (_, bytes) = tokenizer_json(folder)?;
    Ok(hex_digest(&bytes))
}

fn hex_digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn tokenizer_json(folder: &Path) -> Result<(PathBuf, Vec<u8>), TextError> {
    let path = folder.join("tokenizer.json");
    match std::fs::read(&path) {
        Ok(bytes) => Ok((path, bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            match SLOW_FILES
                .into_iter()
                .find(|name| folder.join(name).exists())
            {
                Some(found) => Err(TextError::SlowTokenizer {
                    folder: folder.to_owned(),
                    found,
                }),
                None => Err(TextError::Missing {
                    path,
                    what: "no such file; it is the model's tokenizer".to_owned(),
                }),
            }
        }
        Err(error) => Err(TextError::Damaged {
            path,
            reason: error.to_string(),
        }),
    }
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// A token's string: given plainly, or as an object of an added token.
fn token_content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// A file's text; `None` if there is none.
fn read_text(path: &Path) -> Result<Option<String>, TextError> {
    match std::fs::read(path) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(text)),
            Err(error) => Err(TextError::Damaged {
                path: path.to_owned(),
                reason: error.to_string(),
            }),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TextError::Damaged {
            path: path.to_owned(),
            reason: error.to_string(),
        }),
    }
}

fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, TextError> {
    let Some(text) = read_text(path)? else {
        return Ok(None);
    };
    match serde_json::from_str(&text) {
        Ok(Value::Object(object)) => Ok(Some(object)),
        Ok(_) => Err(TextError::Damaged {
            path: path.to_owned(),
            reason: "not a JSON object".to_owned(),
        }),
        Err(error) => Err(TextError::Damaged {
            path: path.to_owned(),
            reason: error.to_string(),
        }),
    }
}

fn sorted_files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, TextError> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(TextError::Damaged {
                path: folder.to_owned(),
                reason: error.to_string(),
            });
        }
    };
    let mut paths: Vec<_> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    paths.sort();
    Ok(paths)
}
