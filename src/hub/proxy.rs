//! The environment's proxies. Each address has the one of its scheme, else that of `ALL_PROXY`, unless `NO_PROXY` names
//! its host; of two spellings the small one counts, as in Python and curl.

use std::ffi::OsString;
use std::net::IpAddr;

use super::http::Url;
use crate::error::{Error, Result};

/// The proxies for `https` and `http`, none by default.
#[derive(Clone, Default)]
pub(super) struct Proxies {
    https: Way,
    http: Way,
    /// What `NO_PROXY` lists.
    direct: Vec<String>,
}

#[derive(Clone, Default)]
enum Way {
    #[default]
    Direct,
    Through(ureq::Proxy),
    /// The name of a variable that holds something else. Going directly instead could betray what the proxy hides.
    Unreadable(&'static str),
}

impl Proxies {
    pub(super) fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Self {
        let value = |name: &str| var(&name.to_ascii_lowercase()).or_else(|| var(name));
        let way = |name: &'static str| {
            let (name, value) = [name, "ALL_PROXY"].into_iter().find_map(|name| Some((name, value(name)?)))?;
            let proxy = match value.to_str().map(str::trim) {
                Some("") => return None,
                text => text.and_then(|text| ureq::Proxy::new(text).ok()),
            };
            // A proxy of SOCKS would bring a crate more.
            let is_known = |proxy: &ureq::Proxy| {
                matches!(proxy.protocol(), ureq::ProxyProtocol::Http | ureq::ProxyProtocol::Https)
            };
            Some(proxy.filter(is_known).map_or(Way::Unreadable(name), Way::Through))
        };
        let direct = value("NO_PROXY").unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        Proxies {
            https: way("HTTPS_PROXY").unwrap_or_default(),
            http: way("HTTP_PROXY").unwrap_or_default(),
            direct: direct.split([',', ' ']).filter(|entry| !entry.is_empty()).map(str::to_owned).collect(),
        }
    }

    /// The proxy for an address, if it has one.
    pub(super) fn of(&self, url: &Url) -> Result<Option<&ureq::Proxy>> {
        let (is_https, host, port) = url.origin();
        let host = host.trim_matches(['[', ']']);
        match if is_https { &self.https } else { &self.http } {
            Way::Direct => Ok(None),
            _ if self.direct.iter().any(|entry| names(entry, host, port)) => Ok(None),
            Way::Through(proxy) => Ok(Some(proxy)),
            // Its value may hold a password.
            Way::Unreadable(name) => Err(Error::usage(format!(
                "{name} is no proxy that can be used; needs http://[USER:PASSWORD@]HOST[:PORT]"
            ))),
        }
    }
}

/// Whether an entry of `NO_PROXY` names this host: itself or its domain, with or without a port, a network, or all.
fn names(entry: &str, host: &str, port: u16) -> bool {
    let ip: Option<IpAddr> = host.parse().ok();
    if let Some(within) = ip.and_then(|ip| within(ip, entry)) {
        return within;
    }
    let entry = entry.strip_suffix(&format!(":{port}")).unwrap_or(entry).trim_matches(['[', ']']);
    if ip.is_some() {
        return entry == "*" || entry.parse().ok() == ip;
    }
    let domain = entry.trim_start_matches('*').trim_start_matches('.');
    entry == "*" || host.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Whether the address is in `NETWORK/BITS`; `None` if that is no network of its kind.
fn within(ip: IpAddr, network: &str) -> Option<bool> {
    let (network, bits) = network.split_once('/')?;
    let (ip, network, width) = match (ip, network.parse().ok()?) {
        (IpAddr::V4(ip), IpAddr::V4(network)) => (u32::from(ip).into(), u32::from(network).into(), 32_u32),
        (IpAddr::V6(ip), IpAddr::V6(network)) => (u128::from(ip), u128::from(network), 128),
        _ => return None,
    };
    let host_bits = width.checked_sub(bits.parse().ok()?)?;
    let prefix = |address: u128| address.checked_shr(host_bits).unwrap_or(0);
    Some(prefix(ip) == prefix(network))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// HOST:PORT of the proxy for an address, "direct", or the error.
    fn of(vars: &[(&str, &str)], address: &str) -> String {
        let var = |name: &str| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
        match Proxies::from_vars(var).of(&Url::parse(address).unwrap()) {
            Ok(Some(proxy)) => format!("{}:{}", proxy.host(), proxy.port()),
            Ok(None) => "direct".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn each_scheme_has_its_proxy() {
        let [s, p, a] = [("HTTPS_PROXY", "http://s:1"), ("HTTP_PROXY", "p:2"), ("ALL_PROXY", "https://u:pw@a")];
        for (vars, https, http) in [
            (&[][..], "direct", "direct"),
            (&[s], "s:1", "direct"),
            (&[p], "direct", "p:2"),
            (&[a, s], "s:1", "a:443"),
            (&[a], "a:443", "a:443"),
            (&[s, ("https_proxy", "http://small:3")], "small:3", "direct"),
            (&[s, a, ("https_proxy", "")], "direct", "a:443"),
            (&[s, ("no_proxy", "*")], "direct", "direct"),
        ] {
            assert_eq!(
                (of(vars, "https://hub/x").as_str(), of(vars, "http://hub/x").as_str()),
                (https, http),
                "{vars:?}"
            );
        }
        for bad in ["ftp://secret@h", "socks5://secret@h:1080", "http://", "secret value"] {
            let told = of(&[("HTTPS_PROXY", bad)], "https://hub/x");
            assert!(told.starts_with("HTTPS_PROXY is no") && !told.contains("secret"), "{told}");
            assert_eq!(of(&[("HTTPS_PROXY", bad)], "http://hub/x"), "direct");
            assert_eq!(of(&[("HTTPS_PROXY", bad), ("NO_PROXY", "hub")], "https://hub/x"), "direct");
            assert!(of(&[("ALL_PROXY", bad)], "https://hub/x").starts_with("ALL_PROXY is no"));
        }
    }

    #[test]
    fn no_proxy_names_hosts_domains_ports_and_networks() {
        for (entries, address, direct) in [
            ("hub.example", "https://hub.example/x", true),
            ("other, HUB.example", "https://Hub.Example/x", true),
            ("example", "https://hub.example/x", true),
            (".example", "https://hub.example/x", true),
            ("*.example", "https://hub.example/x", true),
            ("xample", "https://hub.example/x", false),
            ("hub.example.org", "https://hub.example/x", false),
            ("hub.example:443", "https://hub.example/x", true),
            ("hub.example:444", "https://hub.example/x", false),
            ("", "https://hub.example/x", false),
            (".", "https://hub.example/x", false),
            ("10.0.0.0/8", "https://10.1.2.3/x", true),
            ("10.0.0.0/8", "https://11.1.2.3/x", false),
            ("0.0.0.0/0", "https://11.1.2.3/x", true),
            ("10.0.0.0/33", "https://10.0.0.0/x", false),
            ("10.1.2.3", "https://10.1.2.3:99/x", true),
            ("1.2.3", "https://10.1.2.3/x", false),
            ("2.3", "https://1.2.3.2.3/x", true),
            ("10.1.2.3:99", "https://10.1.2.3:99/x", true),
            ("::1", "https://[::1]:99/x", true),
            ("[::1]:99", "https://[::1]:99/x", true),
            ("fd00::/8", "https://[fd12::1]/x", true),
            ("fd00::/8", "https://10.1.2.3/x", false),
            ("::/0", "https://[fd12::1]/x", true),
        ] {
            let found = of(&[("HTTPS_PROXY", "http://p"), ("NO_PROXY", entries)], address);
            assert_eq!(found, if direct { "direct" } else { "p:80" }, "{entries:?} {address}");
        }
    }
}
