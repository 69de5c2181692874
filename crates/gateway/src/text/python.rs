//! Python's string and dict methods, and the filters and tests where Jinja2 differs from minijinja.

use std::sync::Arc;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};

use super::json::{dict, repr, str_of, tojson};
use super::rewrite::PERCENT_FORMAT;

/// Make `environment` behave as transformers' Jinja2 environment does.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("dict", new_dict);
    environment.add_filter("tojson", tojson);
    environment.add_filter("trim", trim);
    environment.add_filter("string", |value: &Value| str_of(value));
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("indent", indent);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    environment.add_filter(PERCENT_FORMAT, percent_format);
    environment.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map
        )
    });
    environment.add_test("iterable", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Undefined
                | ValueKind::String
                | ValueKind::Seq
                | ValueKind::Map
                | ValueKind::Iterable
        )
    });
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
}

/// Marks the error of a template that refuses the conversation.
#[derive(Debug)]
pub(super) struct Raised;

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("raise_exception")
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, str_of(message)).with_source(Raised))
}

fn strftime_now(pattern: &str) -> Result<String, Error> {
    use std::fmt::Write as _;
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(pattern))
        .map_err(|_| refuse(format!("strftime_now: {pattern:?} is not a time format")))?;
    Ok(text)
}

fn trim(value: &Value, chars: Option<&str>) -> String {
    strip(&str_of(value), chars, true, true).to_owned()
}

fn new_dict(base: Option<&Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let mut entries: Vec<(Arc<str>, Value)> = Vec::new();
    if let Some(base) = base {
        for key in base.try_iter()? {
            entries.push((str_of(&key).into(), base.get_item(&key)?));
        }
    }
    for name in kwargs.args() {
        entries.retain(|(key, _)| &**key != name);
        entries.push((name.into(), kwargs.get(name)?));
    }
    Ok(dict(entries.into_iter()))
}

/// Jinja2's `int`: what is no number is the default.
fn int(value: &Value, default: Option<Value>) -> Value {
    let truncated = |number: f64| {
        // Beyond i64 a template has no use for the exact number.
        if number.is_finite() {
            Some(number.trunc() as i64)
        } else {
            None
        }
    };
    let parsed = match value.as_str() {
        Some(text) => {
            let digits = text.trim().replace('_', "");
            digits
                .parse()
                .ok()
                .or_else(|| truncated(digits.parse().ok()?))
        }
        None if value.kind() == ValueKind::Bool => Some(i64::from(value.is_true())),
        None => value
            .as_i64()
            .or_else(|| truncated(f64::try_from(value.clone()).ok()?)),
    };
    parsed.map_or_else(|| default.unwrap_or_else(|| Value::from(0)), Value::from)
}

/// Jinja2's `float`: what is no number is the default.
fn float(value: &Value, default: Option<Value>) -> Value {
    let parsed = match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None => f64::try_from(value.clone()).ok(),
    };
    parsed.map_or_else(|| default.unwrap_or_else(|| Value::from(0.0)), Value::from)
}

/// Jinja2's `indent(width=4, first=False, blank=False)`, which also makes every line end a newline.
fn indent(value: &Value, given: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |position: usize, name: &str| match given.get(position) {
        Some(value) => Ok(Some(value.clone())),
        None => kwargs.get::<Option<Value>>(name),
    };
    let width = argument(0, "width")?;
    let first = argument(1, "first")?.is_some_and(|first| first.is_true());
    let blank = argument(2, "blank")?.is_some_and(|blank| blank.is_true());
    kwargs.assert_all_used()?;
    let space = match &width {
        None => "    ".to_owned(),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => padding("", width.as_usize().unwrap_or(0), ' ')?,
        },
    };
    let text = str_of(value) + "\n";
    let mut out = String::new();
    for (index, line) in splitlines(&text, false).iter().enumerate() {
        let line = line.as_str().unwrap_or_default();
        if index > 0 {
            out.push('\n');
        }
        let indented = if index == 0 {
            first
        } else {
            blank || !line.is_empty()
        };
        if indented {
            out.push_str(&space);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// Python's `len`, and 0 for what is undefined.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    let none = || refuse(format!("a value of type {} has no length", value.kind()));
    value.len().ok_or_else(none)
}

/// `format % operand` of Python: a tuple gives many values, anything else one.
fn percent_format(text: &Value, operand: &Value) -> Result<Value, Error> {
    let pattern = text
        .as_str()
        .ok_or_else(|| refuse("'%' formats strings only".to_owned()))?;
    let values = match operand.downcast_object_ref::<Tuple>() {
        Some(_) => operand.try_iter()?.map(printable).collect(),
        None => vec![printable(operand.clone())],
    };
    format(FormatStyle::Printf, pattern, &values).map(Value::from)
}

/// Containers as Python's text of them; the rest as it is.
fn printable(value: Value) -> Value {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => Value::from(repr(&value)),
        _ => value,
    }
}

fn refuse(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        if let Some(result) = string_method(text, name, args)? {
            return Ok(result);
        }
    } else if value.kind() == ValueKind::Map && name == "get" {
        let (key, default): (&Value, Option<&Value>) = from_args(args)?;
        let found = value.get_item(key)?;
        return Ok(match (found.is_undefined(), default) {
            (false, _) => found,
            (true, Some(default)) => default.clone(),
            (true, None) => Value::from(()),
        });
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// Methods of `str` that minijinja-contrib lacks, or has with Rust's idea of white space.
fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
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

fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
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

fn splitlines(text: &str, keep: bool) -> Vec<Value> {
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

fn padding(text: &str, width: usize, fill: char) -> Result<String, Error> {
    const MAX_WIDTH: usize = 1 << 16;
    if width > MAX_WIDTH {
        return Err(refuse(format!("a width of {width} is above {MAX_WIDTH}")));
    }
    Ok(fill
        .to_string()
        .repeat(width.saturating_sub(text.chars().count())))
}
