//! A rule as `nft` writes it, nearly: what has no short form here is shown as its JSON.

use serde_json::Value;

use super::only;

/// The words of a rule, and its comment.
pub(super) fn rule(statements: &[Value], comment: Option<&str>) -> String {
    let comment = comment.map(|comment| format!("comment \"{comment}\""));
    let words: Vec<String> = statements.iter().map(statement).chain(comment).collect();
    words.join(" ")
}

fn statement(statement: &Value) -> String {
    let Some((word, body)) = only(statement) else {
        return value(statement);
    };
    match word {
        "match" => {
            let left = value(&body["left"]);
            let right = match &body["right"] {
                right if left == "ct state" => state(right),
                right => value(right),
            };
            let is_computed = matches!(only(&body["left"]), Some(("&" | "|" | "^", _)));
            match body["op"].as_str() {
                None | Some("in") => format!("{left} {right}"),
                Some("==") if !is_computed => format!("{left} {right}"),
                Some(operator) => format!("{left} {operator} {right}"),
            }
        }
        "vmap" => format!("{} vmap {}", value(&body["key"]), value(&body["data"])),
        "mangle" => format!("{} set {}", value(&body["key"]), value(&body["value"])),
        "log" => match body["prefix"].as_str() {
            Some(prefix) => format!("log prefix \"{prefix}\""),
            None => "log".to_owned(),
        },
        "limit" if body["rate"].is_u64() => {
            let over = if body["inv"] == true { "over " } else { "" };
            format!("limit rate {over}{}/{}", body["rate"], value(&body["per"]))
        }
        "reject" => match body["type"].as_str() {
            Some(with) => format!("reject with {with}"),
            None => "reject".to_owned(),
        },
        "xt" => format!("xt {} {}", value(&body["type"]), value(&body["name"])),
        _ => value(statement),
    }
}

fn state(states: &Value) -> String {
    let name = |state: &Value| match state.as_u64() {
        Some(1) => "invalid".to_owned(),
        Some(2) => "established".to_owned(),
        Some(4) => "related".to_owned(),
        Some(8) => "new".to_owned(),
        Some(64) => "untracked".to_owned(),
        _ => value(state),
    };
    match states {
        Value::Array(states) => states.iter().map(name).collect::<Vec<_>>().join(","),
        state => name(state),
    }
}

fn joined(values: &Value, by: &str) -> String {
    let values = values.as_array().map_or(&[][..], Vec::as_slice);
    values.iter().map(value).collect::<Vec<_>>().join(by)
}

fn value(of: &Value) -> String {
    match of {
        Value::String(text) => return text.clone(),
        Value::Array(_) => return joined(of, ","),
        _ => {}
    }
    let Some((word, body)) = only(of) else {
        return of.to_string();
    };
    match word {
        "payload" => format!("{} {}", value(&body["protocol"]), value(&body["field"])),
        "meta" => match body["key"].as_str() {
            Some(key @ ("iif" | "oif" | "iifname" | "oifname")) => key.to_owned(),
            _ => format!("meta {}", value(&body["key"])),
        },
        "ct" => format!("ct {}", value(&body["key"])),
        "fib" => {
            let flags = match &body["flags"] {
                flags @ Value::Array(_) => joined(flags, " . "),
                flag => value(flag),
            };
            format!("fib {flags} {}", value(&body["result"]))
        }
        "concat" => joined(body, " . "),
        "&" | "|" | "^" | "<<" | ">>" => joined(body, &format!(" {word} ")),
        "range" => joined(body, "-"),
        "prefix" => format!("{}/{}", value(&body["addr"]), value(&body["len"])),
        "set" => {
            let members = body.as_array().map_or(&[][..], Vec::as_slice);
            let member = |member: &Value| match member.as_array().map(Vec::as_slice) {
                Some([key, verdict]) => format!("{} : {}", value(key), value(verdict)),
                _ => value(member),
            };
            format!(
                "{{ {} }}",
                members.iter().map(member).collect::<Vec<_>>().join(", ")
            )
        }
        "elem" => value(&body["val"]),
        "jump" | "goto" => format!("{word} {}", value(&body["target"])),
        _ if body.is_null() => word.to_owned(),
        _ => of.to_string(),
    }
}
