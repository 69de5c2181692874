//! Python's methods of `str`.

use minijinja::value::{Kwargs, Tuple, Value, from_args};
use minijinja::{Error, ErrorKind};

/// The error of an operation that Python refuses too.
pub(super) fn refuse(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// Methods of `str` that minijinja-contrib lacks, or has with Rust's idea of white space.
pub(super) fn string_method(
    text: &str,
    name: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    let result = match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(text, chars, name != "rstrip", name != "lstrip"))
        }
        "split" | "rsplit" => {
            let (separator, limit, kwargs): (Option<&Value>, Option<i64>, Kwargs) =
                from_args(args)?;
            let separator = separator.cloned().or(kwargs.get::<Option<Value>>("sep")?);
            let limit = limit
                .or(kwargs.get::<Option<i64>>("maxsplit")?)
                .unwrap_or(-1);
            kwargs.assert_all_used()?;
            let limit = usize::try_from(limit).unwrap_or(usize::MAX - 1);
            split(
                text,
                separator.as_ref().and_then(Value::as_str),
                limit,
                name == "rsplit",
            )?
        }
        "splitlines" => {
            let (keep, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = keep
                .or(kwargs.get::<Option<bool>>("keepends")?)
                .unwrap_or(false);
            kwargs.assert_all_used()?;
            Value::from(splitlines(text, keep))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let first = name == "partition";
            let found = if first {
                text.split_once(separator)
            } else {
                text.rsplit_once(separator)
            };
            let parts = match found {
                Some((before, after)) => [before, separator, after],
                None if first => [text, "", ""],
                None => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" | "removesuffix" => {
            let (affix,): (&str,) = from_args(args)?;
            let shorter = if name == "removeprefix" {
                text.strip_prefix(affix)
            } else {
                text.strip_suffix(affix)
            };
            Value::from(shorter.unwrap_or(text))
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (what, start): (&str, Option<i64>) = from_args(args)?;
            let skipped = char_position(text, start.unwrap_or(0));
            let rest = &text[skipped..];
            let found = if name.starts_with('r') {
                rest.rfind(what)
            } else {
                rest.find(what)
            };
            match found {
                Some(at) => Value::from(text[..skipped + at].chars().count()),
                None if name.ends_with("index") => {
                    return Err(refuse("substring not found".to_owned()));
                }
                None => Value::from(-1),
            }
        }
        "swapcase" => Value::from(
            text.chars()
                .flat_map(|c| -> Vec<char> {
                    if c.is_uppercase() {
                        c.to_lowercase().collect()
                    } else {
                        c.to_uppercase().collect()
                    }
                })
                .collect::<String>(),
        ),
        "title" => Value::from(title(text)),
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss")),
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            Value::from(format!("{sign}{}{digits}", padding(text, width, '0')?))
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let fill = fill.unwrap_or(' ');
            let pad = padding(text, width, fill)?;
            Value::from(match name {
                "ljust" => format!("{text}{pad}"),
                "rjust" => format!("{pad}{text}"),
                _ => {
                    let count = pad.chars().count();
                    // Python puts the odd one on the left when the width is odd.
                    let left = count / 2 + (count & width & 1);
                    let side = |n: usize| fill.to_string().repeat(n);
                    format!("{}{text}{}", side(left), side(count - left))
                }
            })
        }
        "isdecimal" => Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())),
        "isspace" => Value::from(!text.is_empty() && text.chars().all(is_space)),
        _ => return Ok(None),
    };
    Ok(Some(result))
}

/// Python's `str.title`: every letter after something that is none is a capital.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut within = false;
    for c in text.chars() {
        if within {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        within = c.is_alphabetic();
    }
    out
}

/// Python's `str.isspace`: Unicode white space and the four ASCII separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let drop = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if left {
        text.trim_start_matches(drop)
    } else {
        text
    };
    if right {
        text.trim_end_matches(drop)
    } else {
        text
    }
}

fn split(
    text: &str,
    separator: Option<&str>,
    limit: usize,
    from_right: bool,
) -> Result<Value, Error> {
    let mut parts: Vec<&str> = match (separator, from_right) {
        (Some(""), _) => return Err(refuse("empty separator".to_owned())),
        (Some(separator), false) => text.splitn(limit + 1, separator).collect(),
        (Some(separator), true) => text.rsplitn(limit + 1, separator).collect(),
        (None, false) => split_space(text, limit),
        (None, true) => rsplit_space(text, limit),
    };
    if from_right {
        parts.reverse();
    }
    Ok(Value::from_iter(parts.into_iter().map(Value::from)))
}

fn split_space(text: &str, limit: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let end = if parts.len() == limit {
            None
        } else {
            rest.find(is_space)
        };
        let (part, after) = rest.split_at(end.unwrap_or(rest.len()));
        parts.push(part);
        rest = after.trim_start_matches(is_space);
    }
    parts
}

/// Parts from the last to the first.
fn rsplit_space(text: &str, limit: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_end_matches(is_space);
    while !rest.is_empty() {
        let last_space = if parts.len() == limit {
            None
        } else {
            rest.char_indices().rfind(|(_, c)| is_space(*c))
        };
        let start = last_space.map_or(0, |(at, c)| at + c.len_utf8());
        parts.push(&rest[start..]);
        rest = rest[..start].trim_end_matches(is_space);
    }
    parts
}

pub(super) fn splitlines(text: &str, keep: bool) -> Vec<Value> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(end) = rest.find(is_end) else {
            lines.push(Value::from(rest));
            break;
        };
        let width = if rest[end..].starts_with("\r\n") {
            2
        } else {
            rest[end..].chars().next().map_or(1, char::len_utf8)
        };
        lines.push(Value::from(&rest[..if keep { end + width } else { end }]));
        rest = &rest[end + width..];
    }
    lines
}

/// Byte position of a character index, negative from the end.
fn char_position(text: &str, index: i64) -> usize {
    let index = match usize::try_from(index) {
        Ok(index) => index,
        Err(_) => {
            let back = usize::try_from(index.unsigned_abs()).unwrap_or(usize::MAX);
            text.chars().count().saturating_sub(back)
        }
    };
    text.char_indices()
        .nth(index)
        .map_or(text.len(), |(at, _)| at)
}

pub(super) fn padding(text: &str, width: usize, fill: char) -> Result<String, Error> {
    const MAX_WIDTH: usize = 1 << 16;
    if width > MAX_WIDTH {
        return Err(refuse(format!("a width of {width} is above {MAX_WIDTH}")));
    }
    Ok(fill
        .to_string()
        .repeat(width.saturating_sub(text.chars().count())))
}
