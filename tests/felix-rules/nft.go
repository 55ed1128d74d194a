package main

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"maps"

	"github.com/projectcalico/calico/felix/iptables"
	"github.com/projectcalico/calico/felix/rules"
)

// What is written by hand, as input of `iptables-restore` and of `nft -f`.

func (r release) layers() []layer {
	raw, mangle, filter := rawLayer(), mangleLayer(), r.filterLayer()
	raw.chains = append(raw.chains, r.hostsInRaw()...)
	mangle.chains = append(mangle.chains, r.hostsInMangle()...)
	filter.chains = append(filter.chains, r.hostsInFilter()...)
	filter.chains = append(filter.chains, r.workloads()...)
	return []layer{raw, mangle, r.natLayer(), filter}
}

// iptables are the layers as tables, for [restoreInput].
func (r release) iptables() (tables []table) {
	for _, layer := range r.layers() {
		made := table{name: layer.name, insert: jumps(layer.insert)}
		for _, of := range layer.chains {
			chain := &iptables.Chain{Name: of.name}
			for _, rule := range of.rules {
				chain.Rules = append(chain.Rules, rule.iptables())
			}
			made.chains = append(made.chains, chain)
		}
		if layer.name == "filter" {
			var end []iptables.Rule
			for _, rule := range forwardEnd() {
				end = append(end, rule.iptables())
			}
			made.then = map[string][]iptables.Rule{"FORWARD": end}
		}
		tables = append(tables, made)
	}
	return tables
}

func (r rule) iptables() iptables.Rule {
	made := iptables.Rule{Match: r.when.iptables, Comment: r.comments}
	if r.then != nil {
		made.Action = *r.then
	}
	return made
}

// Base chains: layer, hook, type, priority (`felix/nftables/table.go`).
var bases = []struct {
	name, hook, kind string
	priority         int
}{
	{"raw-PREROUTING", "prerouting", "filter", -300},
	{"raw-OUTPUT", "output", "filter", -300},
	{"mangle-PREROUTING", "prerouting", "filter", -150},
	{"mangle-INPUT", "input", "filter", -150},
	{"mangle-FORWARD", "forward", "filter", -150},
	{"mangle-OUTPUT", "output", "route", -150},
	{"mangle-POSTROUTING", "postrouting", "filter", -150},
	{"nat-PREROUTING", "prerouting", "nat", -100},
	{"nat-INPUT", "input", "nat", -100},
	{"nat-OUTPUT", "output", "nat", 100},
	{"nat-POSTROUTING", "postrouting", "nat", 100},
	{"filter-INPUT", "input", "filter", 0},
	{"filter-FORWARD", "forward", "filter", 0},
	{"filter-OUTPUT", "output", "filter", 0},
}

// nftInput is the table as Felix has it: chains named after their layers (`felix/nftables/table_layer.go`), sets, and maps
// from interfaces to chains (`felix/rules/dispatch.go`, `felix/nftables/maps.go`).
func (r release) nftInput() string {
	var text strings.Builder
	line := func(format string, arguments ...interface{}) { fmt.Fprintf(&text, format+"\n", arguments...) }
	family, kind := "ip", "ipv4_addr"
	if r.ipv6 {
		family, kind = "ip6", "ipv6_addr"
	}
	line("add table %s calico", family)
	for _, base := range bases {
		line("add chain %s calico %s { type %s hook %s priority %d; }", family, base.name, base.kind, base.hook, base.priority)
	}
	layers := r.layers()
	for _, layer := range layers {
		for _, chain := range layer.chains {
			line("add chain %s calico %s-%s", family, layer.name, chain.name)
		}
	}
	for _, set := range setsOf(r.ipv6) {
		line("add set %s calico %s { type %s; flags interval; }", family, legal(set.name), kind)
		line("add element %s calico %s { %s }", family, legal(set.name), strings.Join(set.members, ", "))
	}
	for _, direction := range []direction{ingress, egress} {
		line("add map %s calico filter-%s { type ifname : verdict; }", family, direction.dispatch)
		for _, of := range allEndpoints {
			line(`add element %s calico filter-%s { "%s" : goto filter-%s%s }`, family, direction.dispatch, of.iface, direction.endpoint, of.iface)
		}
	}
	for _, layer := range layers {
		for _, hook := range slices.Sorted(maps.Keys(layer.insert)) {
			body := []rule{do(jump(layer.insert[hook]))}
			if layer.name+hook == "filterFORWARD" {
				body = append(body, forwardEnd()...)
			}
			writeNft(line, family, layer.name, chain{hook, body})
		}
		for _, chain := range layer.chains {
			writeNft(line, family, layer.name, chain)
		}
	}
	return text.String()
}

func writeNft(line func(string, ...interface{}), family, layer string, of chain) {
	name := layer + "-" + of.name
	hash := sha256.Sum224([]byte(name))
	for _, rule := range of.rules {
		text := rule.nftables(family, layer)
		// Each with that of the rule before it, as in iptables (`felix/generictables/rules.go`).
		hash = sha256.Sum224(append(hash[:], text...))
		digest := rules.RuleHashPrefix + base64.RawURLEncoding.EncodeToString(hash[:])[:iptables.HashLength] + ";"
		line(`add rule %s calico %s %s comment "%s"`, family, name, text, nftComment(digest, rule.comments))
	}
}

// nftables is the rule's text; each that does something counts (`felix/nftables/renderer.go`).
func (r rule) nftables(family, layer string) string {
	words := slices.Clone(r.when.nftables)
	for index, word := range words {
		words[index] = strings.NewReplacer("<LAYER>", layer, "<IPV>", family).Replace(word)
	}
	if r.then != nil {
		words = append(words, "counter", r.then.nftables)
		if r.then.chain != "" {
			words = append(words, layer+"-"+r.then.chain)
		}
	}
	if len(words) == 0 {
		return "continue"
	}
	return strings.Join(words, " ")
}

var unsafe = regexp.MustCompile(`[^\w @%+=:,./-]`)

// nftComment is the digest and all comments, each with its share of the 128 bytes that a comment may have.
func nftComment(digest string, comments []string) string {
	const most = 128
	words := []string{digest}
	for _, comment := range comments {
		comment = unsafe.ReplaceAllString(comment, "_")
		words = append(words, comment[:min(len(comment), (most-len(digest))/len(comments))])
	}
	text := strings.Join(words, " ")
	return text[:min(len(text), most)]
}
