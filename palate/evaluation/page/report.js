(function(){
[].forEach.call(document.querySelectorAll('.compared'),function(part){
var pairs=part.querySelector('.pairs'),tools=part.querySelector('.tools');
if(!pairs||!tools)return;
tools.hidden=false;
var buttons={side:tools.querySelector('.side'),slid:tools.querySelector('.over'),stacked:tools.querySelector('.stack')};
var all=tools.querySelector('.all');
var views=[].slice.call(pairs.querySelectorAll('.views'));
function sides(v){return [].slice.call(v.querySelectorAll('.view'))}
function turn(v,n){var s=sides(v);v.dataset.on=String((n+s.length)%s.length);
s.forEach(function(x,i){x.classList.toggle('on',i===+v.dataset.on)});
v.setAttribute('aria-label','Shown: '+s[+v.dataset.on].querySelector('span').textContent+'. Press for the next')}
function show(mode){
['slid','stacked'].forEach(function(m){pairs.classList.toggle(m,m===mode)});
Object.keys(buttons).forEach(function(m){if(buttons[m])buttons[m].setAttribute('aria-pressed',String(m===mode))});
all.hidden=mode!=='stacked';
views.forEach(function(v){
var old=v.querySelector('.slide');if(old)v.removeChild(old);
['tabindex','role','aria-label'].forEach(function(a){v.removeAttribute(a)});
if(mode==='stacked'){v.tabIndex=0;v.setAttribute('role','button');turn(v,sides(v).length-1)}
if(mode==='slid'){var r=document.createElement('input');r.type='range';r.className='slide';r.min=0;r.max=100;r.value=50;
r.setAttribute('aria-label','How much of the first picture is shown, in percent');
r.oninput=function(){v.style.setProperty('--cut',r.value+'%')};r.oninput();v.appendChild(r)}
});}
buttons.side.onclick=function(){show('side')};
if(buttons.slid)buttons.slid.onclick=function(){show('slid')};
buttons.stacked.onclick=function(){show('stacked')};
all.onclick=function(){var n=+views[0].dataset.on+1;views.forEach(function(v){turn(v,n)})};
views.forEach(function(v){
v.onclick=function(){if(pairs.classList.contains('stacked'))turn(v,+v.dataset.on+1)};
v.onkeydown=function(e){if(!pairs.classList.contains('stacked'))return;
var by={' ':1,Enter:1,ArrowRight:1,ArrowLeft:-1}[e.key];if(by){e.preventDefault();turn(v,+v.dataset.on+by)}};
});
});
[].forEach.call(document.querySelectorAll('.samples'),function(part){
var label=part.querySelector('label');if(!label)return;
var range=label.querySelector('input'),shown=label.querySelector('output'),all=[].slice.call(part.querySelectorAll('.sample'));
label.hidden=false;part.classList.add('chosen');
range.oninput=function(){all.forEach(function(f,i){f.classList.toggle('on',i===+range.value)});
shown.textContent=all[+range.value].dataset.step;
range.setAttribute('aria-valuetext',shown.textContent+' updates')};range.oninput();
});
[].forEach.call(document.querySelectorAll('.sortable'),function(table){
var body=table.tBodies[0],heads=[].slice.call(table.tHead.rows[0].cells);
function key(row,i){var c=row.cells[i],t=c.dataset.sort||c.textContent.trim(),n=parseFloat(t);return isNaN(n)?t.toLowerCase():n}
heads.forEach(function(head,i){
var b=document.createElement('button');b.type='button';b.textContent=head.textContent;head.textContent='';head.appendChild(b);
b.onclick=function(){
var down=head.getAttribute('aria-sort')!=='descending';
heads.forEach(function(h){h.removeAttribute('aria-sort')});
head.setAttribute('aria-sort',down?'descending':'ascending');
[].slice.call(body.rows).sort(function(a,b){var x=key(a,i),y=key(b,i);return (x<y?-1:x>y?1:0)*(down?-1:1)})
.forEach(function(r){body.appendChild(r)});
};
});
});
})();
