package main

import (
	"bytes"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"runtime/debug"
	"strings"
	"time"
)

// The parts of an SPDX 2.3 document that are used here.
type (
	spdx struct {
		Version       string         `json:"spdxVersion"`
		License       string         `json:"dataLicense"`
		ID            string         `json:"SPDXID"`
		Name          string         `json:"name"`
		Namespace     string         `json:"documentNamespace"`
		Creation      creation       `json:"creationInfo"`
		Packages      []spdxPackage  `json:"packages"`
		Relationships []relationship `json:"relationships"`
	}
	creation struct {
		Created  string   `json:"created"`
		Creators []string `json:"creators"`
	}
	spdxPackage struct {
		ID        string     `json:"SPDXID"`
		Name      string     `json:"name"`
		Version   string     `json:"versionInfo"`
		Location  string     `json:"downloadLocation"`
		Analyzed  bool       `json:"filesAnalyzed"`
		Concluded string     `json:"licenseConcluded"`
		Declared  string     `json:"licenseDeclared"`
		Copyright string     `json:"copyrightText"`
		Purpose   string     `json:"primaryPackagePurpose,omitempty"`
		Checksums []checksum `json:"checksums,omitempty"`
		Comment   string     `json:"comment,omitempty"`
		Refs      []ref      `json:"externalRefs,omitempty"`
	}
	checksum struct {
		Algorithm string `json:"algorithm"`
		Value     string `json:"checksumValue"`
	}
	ref struct {
		Category string `json:"referenceCategory"`
		Type     string `json:"referenceType"`
		Locator  string `json:"referenceLocator"`
	}
	relationship struct {
		From string `json:"spdxElementId"`
		Type string `json:"relationshipType"`
		To   string `json:"relatedSpdxElement"`
	}
)

const noAssertion = "NOASSERTION"

var notInID = regexp.MustCompile(`[^A-Za-z0-9.-]+`)

// bill says what a binary was built of, by what the linker wrote into it.
func bill(binary []byte, arch string, c commit) ([]byte, error) {
	info, err := buildinfo.Read(bytes.NewReader(binary))
	if err != nil {
		return nil, fmt.Errorf("read what the binary was built of: %w", err)
	}
	const root = "SPDXRef-pillion"
	sum := strings.TrimPrefix(digest(binary), "sha256:")
	doc := spdx{
		Version: "SPDX-2.3", License: "CC0-1.0", ID: "SPDXRef-DOCUMENT", Name: "pillion-" + c.version + "-linux-" + arch,
		Namespace: "https://github.com/pillion-project/pillion/spdx/" + sum,
		Creation:  creation{c.time.Format(time.RFC3339), []string{"Tool: pillion-scripts-image"}},
		Packages: []spdxPackage{{
			ID: root, Name: "pillion", Version: c.version, Location: noAssertion, Purpose: "APPLICATION",
			Concluded: noAssertion, Declared: "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)", Copyright: noAssertion,
			Checksums: []checksum{{"SHA256", sum}},
		}},
		Relationships: []relationship{{"SPDXRef-DOCUMENT", "DESCRIBES", root}},
	}
	if c.revision != "" {
		doc.Packages[0].Location = "git+" + "https://github.com/pillion-project/pillion@" + c.revision
	}
	add := func(p spdxPackage) {
		doc.Packages = append(doc.Packages, p)
		doc.Relationships = append(doc.Relationships, relationship{root, "DEPENDS_ON", p.ID})
	}
	add(module("stdlib", strings.TrimPrefix(info.GoVersion, "go"), ""))
	for _, m := range info.Deps {
		p, err := ofModule(m)
		if err != nil {
			return nil, err
		}
		add(p)
	}
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("write the bill of materials: %w", err)
	}
	return append(b, '\n'), nil
}

// ofModule describes what was linked, which may stand in for another module.
func ofModule(m *debug.Module) (spdxPackage, error) {
	instead := ""
	if m.Replace != nil {
		instead = "in place of " + m.Path
		m = m.Replace
	}
	p := module(m.Path, m.Version, instead)
	if m.Sum == "" {
		return p, nil
	}
	// go.sum's hash is over names and hashes of the files, not over the zip; so it
	// is told in words.
	raw, ok := strings.CutPrefix(m.Sum, "h1:")
	sum, err := base64.StdEncoding.DecodeString(raw)
	if !ok || err != nil {
		return p, fmt.Errorf("the checksum %q of module %s makes no sense", m.Sum, m.Path)
	}
	p.Comment = strings.TrimPrefix(p.Comment+"; go.sum "+m.Sum+" (SHA-256 of the file list: "+hex.EncodeToString(sum)+")", "; ")
	return p, nil
}

func module(path, version, comment string) spdxPackage {
	return spdxPackage{
		ID:   "SPDXRef-module-" + notInID.ReplaceAllString(path+"-"+version, "-"),
		Name: path, Version: version, Location: noAssertion, Purpose: "LIBRARY",
		Concluded: noAssertion, Declared: noAssertion, Copyright: noAssertion, Comment: comment,
		Refs: []ref{{"PACKAGE-MANAGER", "purl", "pkg:golang/" + path + "@" + strings.ReplaceAll(version, "+", "%2B")}},
	}
}
