//! Jinja that minijinja does not parse, rewritten into what it does.
//!
//! - line ends become newlines, as Jinja2 reads them;
//! - `{% generation %} ... {% endgeneration %}` (transformers' mark of the assistant's text) becomes a `with` block,
//!   which renders its body in a scope of its own as the mark does;
//! - `'...' % operand` becomes `'...'|percent_format(operand)`, which binds as tightly.

/// The name of the filter that stands for the `%` operator on strings.
pub(super) const PERCENT_FORMAT: &str = "percent_format";

/// The template `source` in minijinja's dialect.
pub(super) fn rewrite(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    let mut raw = false;
    while let Some((start, kind)) = next_tag(rest) {
        let close = match kind {
            b'%' => "%}",
            b'{' => "}}",
            _ => "#}",
        };
        out.push_str(&rest[..start]);
        let tag = &rest[start..];
        let Some(length) = tag_length(tag, kind, close) else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(length);
        let word = if kind == b'%' { tag_word(tag) } else { "" };
        match word {
            "raw" => raw = true,
            "endraw" => raw = false,
            _ => {}
        }
        match word {
            _ if raw || kind == b'#' => out.push_str(tag),
            "generation" => out.push_str(&tag.replacen("generation", "with", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            _ => {
                let (inner, end) = tag.split_at(tag.len() - close.len());
                out.push_str(&percent(inner));
                out.push_str(end);
            }
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Position and kind (second byte) of the next `{%`, `{{` or `{#`.
fn next_tag(text: &str) -> Option<(usize, u8)> {
    let found = text
        .as_bytes()
        .windows(2)
        .position(|pair| pair[0] == b'{' && matches!(pair[1], b'%' | b'{' | b'#'))?;
    Some((found, text.as_bytes()[found + 1]))
}

/// Length of the tag that `text` begins with; `None` if it never ends.
fn tag_length(text: &str, kind: u8, close: &str) -> Option<usize> {
    if kind == b'#' {
        return text.find(close).map(|end| end + close.len());
    }
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (2, 0_usize);
    while at < bytes.len() {
        match bytes[at] {
            b'\'' | b'"' => {
                at = string_end(text, at)?;
                continue;
            }
            // In `{{ {'a': {}} }}` the first `}}` closes the dictionaries.
            _ if depth == 0 && text.as_bytes()[at..].starts_with(close.as_bytes()) => {
                return Some(at + close.len());
            }
            b'{' | b'(' | b'[' => depth += 1,
            b'}' | b')' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    None
}

/// The first word of a `{% ... %}` tag.
fn tag_word(tag: &str) -> &str {
    let inner = tag[2..].trim_start_matches(['-', '+']).trim_start();
    inner
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .next()
        .unwrap_or_default()
}

/// Position after the string literal that begins at `start`.
fn string_end(text: &str, start: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let quote = bytes[start];
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 1,
            b if b == quote => return Some(at + 1),
            _ => {}
        }
        at += 1;
    }
    None
}

/// An expression with `'...' % operand` rewritten, in operands too.
fn percent(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while let Some(offset) = text[at..].find(['\'', '"']) {
        let start = at + offset;
        let Some(end) = string_end(text, start) else {
            break;
        };
        out.push_str(&text[at..end]);
        at = end;
        while let Some((operand, next)) = percent_operand(text, at) {
            out.push_str(&format!("|{PERCENT_FORMAT}({})", percent(operand)));
            at = next;
        }
    }
    out.push_str(&text[at..]);
    out
}

/// The operand of a `%` that comes next in `text` from `at`, and the position after it.
fn percent_operand(text: &str, at: usize) -> Option<(&str, usize)> {
    let after = text[at..].trim_start().strip_prefix('%')?.trim_start();
    let start = text.len() - after.len();
    let bytes = text.as_bytes();
    let mut end = start;
    if bytes.get(end) == Some(&b'-') {
        end += 1;
    }
    end = match bytes.get(end)? {
        b'\'' | b'"' => string_end(text, end)?,
        b'(' | b'[' | b'{' => bracket_end(text, end)?,
        _ => word_end(text, end),
    };
    if end == start {
        return None;
    }
    // What binds to the operand more tightly than `%`: attributes, items, calls, filters.
    loop {
        let next = text.len() - text[end..].trim_start().len();
        end = match bytes.get(next) {
            Some(b'(' | b'[') => bracket_end(text, next)?,
            Some(b'.' | b'|') => {
                let word = text.len() - text[next + 1..].trim_start().len();
                word_end(text, word)
            }
            _ => return Some((&text[start..end], end)),
        };
    }
}

fn word_end(text: &str, start: usize) -> usize {
    let rest = &text[start..];
    start
        + rest
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(rest.len())
}

/// Position after the bracket that closes the one at `start`.
fn bracket_end(text: &str, start: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (start, 0_usize);
    while at < bytes.len() {
        match bytes[at] {
            b'\'' | b'"' => {
                at = string_end(text, at)?;
                continue;
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::rewrite;

    #[test]
    fn generation_marks_become_with_blocks() {
        assert_eq!(
            rewrite("{%- generation -%}a{% endgeneration %}"),
            "{%- with -%}a{% endwith %}"
        );
    }

    #[test]
    fn percent_takes_its_operand_with_all_that_binds_to_it() {
        assert_eq!(
            rewrite("{{ 'a%s' % x.y[0]|upper ~ 'b' }}"),
            "{{ 'a%s'|percent_format(x.y[0]|upper) ~ 'b' }}"
        );
        assert_eq!(
            rewrite("{{ '%s' % ('a' % b, 2) }}"),
            "{{ '%s'|percent_format(('a'|percent_format(b), 2)) }}"
        );
    }

    #[test]
    fn other_text_stays() {
        for source in [
            "{% if 'a' %}x % y{% endif %}",
            "{% raw %}{{ 'a' % b }}{% endraw %}",
            "{{ {'a': {'b': '%'}} }} {",
            "{{ 7 % 2 }}",
            "{# 'a' % b #}",
        ] {
            assert_eq!(rewrite(source), source);
        }
    }
}
