//! Where the Ollama server is: `OLLAMA_HOST`, read as Ollama's own client reads it.
//!
//! ```text
//! (empty)                 http://127.0.0.1:11434
//! HOST, HOST:PORT, :PORT  http://HOST:PORT, the port 11434 and this machine where they are missing
//! http://HOST[/PATH]      port 80
//! https://HOST[/PATH]     port 443
//! 0.0.0.0, ::             addresses to listen at: a client takes this machine's instead
//! ```

use std::fmt;
use std::net::IpAddr;

/// The address of an Ollama server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OllamaHost {
    scheme: String,
    /// Name or address; an IPv6 address without its brackets.
    host: String,
    port: u16,
    /// Without slashes at its ends.
    path: String,
}

const DEFAULT_PORT: u16 = 11434;
const THIS_MACHINE: &str = "127.0.0.1";

impl OllamaHost {
    /// Reads the value of `OLLAMA_HOST`; `None` and blanks stand for the default.
    pub fn parse(text: Option<&str>) -> Self {
        let text = text.unwrap_or_default().trim().trim_matches(['"', '\'']);
        let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
        let default_port = match scheme {
            "http" => 80,
            "https" => 443,
            _ => DEFAULT_PORT,
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = split_port(authority);
        Self {
            scheme: if scheme.is_empty() { "http" } else { scheme }.to_owned(),
            host: connectable(host),
            port: port.and_then(|port| port.parse().ok()).unwrap_or(default_port),
            path: path.trim_matches('/').to_owned(),
        }
    }

    /// Whether the server is on this machine, so that no proxy stands in between.
    pub fn is_local(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    /// Address of a call such as `api/tags`.
    pub(crate) fn url(&self, call: &str) -> String {
        format!("{self}/{call}")
    }
}

/// The address without a slash at its end.
impl fmt::Display for OllamaHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { scheme, host, port, path } = self;
        let slash = if path.is_empty() { "" } else { "/" };
        if host.contains(':') {
            write!(f, "{scheme}://[{host}]:{port}{slash}{path}")
        } else {
            write!(f, "{scheme}://{host}:{port}{slash}{path}")
        }
    }
}

/// Host and port; an IPv6 address has colons of its own.
fn split_port(authority: &str) -> (&str, Option<&str>) {
    let bare = authority.trim_matches(['[', ']']);
    if bare.parse::<IpAddr>().is_ok() {
        return (bare, None);
    }
    match authority.rsplit_once(':') {
        Some((host, port)) => (host.trim_matches(['[', ']']), Some(port)),
        None => (authority, None),
    }
}

fn connectable(host: &str) -> String {
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) if ip.is_unspecified() => THIS_MACHINE.to_owned(),
        Ok(IpAddr::V6(ip)) if ip.is_unspecified() => "::1".to_owned(),
        Ok(ip) => ip.to_string(),
        Err(_) if host.is_empty() => THIS_MACHINE.to_owned(),
        Err(_) => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_as_ollama_reads_it() {
        for (text, url) in [
            ("", "http://127.0.0.1:11434"),
            ("  ", "http://127.0.0.1:11434"),
            ("nas", "http://nas:11434"),
            ("nas:8080", "http://nas:8080"),
            (":8080", "http://127.0.0.1:8080"),
            ("10.0.0.7", "http://10.0.0.7:11434"),
            ("http://nas", "http://nas:80"),
            ("https://nas", "https://nas:443"),
            ("https://nas:8443/ollama/", "https://nas:8443/ollama"),
            ("nas/ollama", "http://nas:11434/ollama"),
            ("0.0.0.0", "http://127.0.0.1:11434"),
            ("0.0.0.0:1234", "http://127.0.0.1:1234"),
            ("http://0.0.0.0:1234", "http://127.0.0.1:1234"),
            ("::", "http://[::1]:11434"),
            ("[::]:1234", "http://[::1]:1234"),
            ("[::1]", "http://[::1]:11434"),
            ("[fe80::7]:1234", "http://[fe80::7]:1234"),
            ("nas:66666", "http://nas:11434"),
            ("nas:http", "http://nas:11434"),
            ("\"nas:8080\"", "http://nas:8080"),
        ] {
            assert_eq!(OllamaHost::parse(Some(text)).to_string(), url, "{text:?}");
        }
        assert_eq!(OllamaHost::parse(None), OllamaHost::parse(Some("")));
    }

    #[test]
    fn no_proxy_stands_before_this_machine() {
        for text in ["", "localhost", "0.0.0.0", "[::]:1", "127.0.0.2:80"] {
            assert!(OllamaHost::parse(Some(text)).is_local(), "{text:?}");
        }
        assert!(!OllamaHost::parse(Some("10.0.0.7")).is_local());
    }
}
